"""Put the results of all scripts, as tables, into README.md of this folder (--print: only show)."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from _harness import RESULTS, as_markdown, tabulate

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- results -->", "<!-- end of results -->"


def describe(record: Mapping[str, Any]) -> str:
    """Where and with what a record was measured."""
    threads = ", ".join(f"{name} {count}" for name, count in record["threads"].items())
    versions = record["versions"]
    tasks = record.get("tasks", ())
    peers = {row["package"] for task in tasks for row in task["contenders"]}
    shown = sorted(name for name in {*peers, "numpy", "numba", "torch"} if name in versions)
    load = record.get("load_average")
    spent = "." if load is None else f"; load {load:.1f} at the end."
    if "hours" in record:
        spent = f"; seed {record['seed']}, {record['hours']:.2g} hours{spent}"
    return (
        f"{record['date']}; {record['cpu']}, {record['cores']} cores; threads: {threads}; Python "
        f"{record['python']}, " + ", ".join(f"{name} {versions[name]}" for name in shown) + spent
    )


def section(record: Mapping[str, Any]) -> str:
    """Heading, circumstances and table of one script."""
    if "tasks" in record:
        head, body = describe(record), as_markdown(record["tasks"])
    else:
        head = f"{record['about']} {describe(record)}"
        body = tabulate(record["columns"], record["rows"])
    return f"### {record['name']}\n\n{head}\n\n{body}"


def tables(folder: Path) -> str:
    """One section for each result file."""
    records = [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))]
    records = [record for record in records if "name" in record]
    return "\n\n".join(map(section, records)) or "Nothing has been measured yet: run `make bench`."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--print", action="store_true", dest="show", help="leave README.md alone")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    options = parser.parse_args()
    text = tables(options.results)
    if options.show:
        print(text)
        return
    head, rest = README.read_text("utf-8").split(BEGIN)
    tail = rest.split(END)[1]
    README.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}", "utf-8")


if __name__ == "__main__":
    main()
