"""Put all results on polyphonic music into README.md of this folder (--print: only show)."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))
from _harness import tabulate  # noqa: E402 - beside the folder of this script

# Nats per step; bounds, particle estimates where they differ, of the papers that configs name.
PUBLISHED = {
    "jsb": {
        "rnn": "8.45",
        "dmm": "6.926 (particles 6.388)",
        "dmm-feedback": "6.773 (particles 6.288)",
        "dmm-feedback-nade": "5.335 (particles 5.118)",
        "storn": "6.91",
        "vrnn": "6.90",
    },
    "nottingham": {
        "rnn": "3.29",
        "dmm": "2.964 (particles 2.770)",
        "dmm-feedback": "2.856 (particles 2.679)",
        "dmm-feedback-nade": "2.347 (particles 2.305)",
        "storn": "2.85",
        "vrnn": "2.68",
    },
}
COLUMNS = (
    "data",
    "model",
    "seed",
    "epochs",
    "keys",
    "exact",
    "ELBO",
    "IWAE(100)",
    "particles(100)",
    "published",
    "hours",
    "training of 1,000",
    "scoring of 1,000",
)
# Pieces that were learned from, in one key, and those of the validation and the test part.
PIECES = {"jsb": (229, 153), "nottingham": (694, 343)}
ABOUT = """# Likelihoods on polyphonic music

Negative log-likelihood of the test part in nats per time step, all nats over all steps, the first
step included; smaller is better. The ELBO is a lower bound of the log-likelihood, averaged over
100 paths; IWAE and the particle filter, of 100 paths each, are estimates that lie nearer to it.
Weights were chosen by the validation part. "keys" are the keys that each piece of the training
part was learned in: with more than one it was transposed, which the published figures were not.
Hours are of training, on a machine of two cores that did other work beside, and the same is given
as seconds for 1,000 pieces, all keys of a piece included, beside the seconds that all scores of
1,000 pieces take. Settings, curves and all numbers are in `results/`.

"""


def rows(records: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Lines of the table, the simple models of each data set first."""
    out = []
    for r in sorted(records, key=lambda r: (r["data"], r["name"] != "baselines", r["name"])):
        found = r["negative_log_likelihood"]
        if r["name"] == "baselines":
            blank = [""] * 7
            for name, value in found.items():
                out.append([r["data"], name, "", "", "", f"{value:.2f}", *blank])
            continue
        test = found["test"]
        cells = [
            f"{test[kind]['nats_per_step']:.3f}" if kind in test else ""
            for kind in ("exact", "elbo", "iwae", "particle")
        ]
        keys = str(1 + 2 * r["settings"].get("data", {}).get("transpose", 0))
        known = PUBLISHED.get(r["data"], {}).get(r["name"], "")
        head = [r["data"], r["name"], str(r["seed"]), str(r["epochs"]), keys]
        hours = (r["train_hours"], r["score_hours"])
        per_1000 = [
            f"{3.6e6 * spent / count:,.0f} s"
            for spent, count in zip(hours, PIECES[r["data"]], strict=True)
        ]
        out.append([*head, *cells, known, f"{r['train_hours']:.2f}", *per_1000])
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--print", action="store_true", dest="show", help="leave README.md alone")
    options = parser.parse_args()
    paths = sorted((HERE / "results").glob("*.json"))
    text = tabulate(COLUMNS, rows([json.loads(path.read_text("utf-8")) for path in paths]))
    if options.show:
        print(text)
    else:
        (HERE / "README.md").write_text(f"{ABOUT}{text}\n", "utf-8")


if __name__ == "__main__":
    main()
