"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const dashes = ["solid", "dash", "dot", "dashdot", "longdash"];
  const symbols = ["circle", "square", "diamond", "triangle-up", "cross", "x", "star", "hexagon"];
  const touch = matchMedia("(pointer: coarse)").matches;
  const config = {
    responsive: true,
    displaylogo: false,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "sendDataToCloud"],
    displayModeBar: touch ? false : "hover",
    doubleClick: "reset+autosize",
  };
  const drawn = new Map(); // element -> function that makes [traces, layout]

  const byId = (id) => document.getElementById(id);
  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const colour = (model) => css(`--c${data.models.indexOf(model) % 8}`);
  const faint = (hex, alpha) => {
    const [r, g, b] = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
    return `rgba(${r}, ${g}, ${b}, ${alpha})`;
  };
  // The plotting library reads some tags and entities in text: a name is to be shown as it is.
  const plain = (name) =>
    String(name).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const short = (name, most = 22) =>
    plain(name.length > most ? `${name.slice(0, most - 1)}\u2026` : name);
  const make = (tag, attributes = {}, children = []) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  };

  const axis = (title, more = {}) => ({
    title: { text: plain(title), font: { size: 12, color: css("--muted") }, standoff: 8 },
    gridcolor: css("--grid"),
    linecolor: css("--rule"),
    zeroline: false,
    automargin: true,
    tickfont: { size: 11, color: css("--muted") },
    ...more,
  });
  const layout = (x, y, more = {}) => ({
    height: 260,
    margin: { l: 48, r: 10, t: 10, b: 40 },
    paper_bgcolor: css("--ground"),
    plot_bgcolor: css("--ground"),
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: css("--ink") },
    hoverlabel: {
      bgcolor: css("--raised"),
      bordercolor: css("--rule"),
      font: { color: css("--ink"), size: 12 },
    },
    showlegend: false,
    hovermode: "closest",
    dragmode: touch ? false : "zoom",
    xaxis: { showgrid: false, ...x },
    yaxis: y,
    ...more,
  });
  const draw = (element, build) => {
    drawn.set(element, build);
    const [traces, shape] = build();
    if (root.classList.contains("printing")) shape.width = element.clientWidth;
    return Plotly.react(element, traces, shape, config);
  };
  const redraw = () => drawn.forEach((build, element) => draw(element, build));

  const figure = (parent, title, label, build) => {
    const plot = make("div", { class: "plot", role: "group", "aria-label": label });
    parent.append(make("figure", {}, [make("figcaption", {}, [title]), plot]));
    draw(plot, build);
  };
  const band = (x, low, high, shade) => [
    { x, y: low, mode: "lines", line: { width: 0 }, hoverinfo: "skip" },
    {
      x,
      y: high,
      mode: "lines",
      line: { width: 0 },
      fill: "tonexty",
      fillcolor: shade,
      hoverinfo: "skip",
    },
  ];
  const choose = (id, names, onChange) => {
    const select = byId(id);
    select.replaceChildren(...names.map((name, k) => make("option", { value: k }, [name])));
    select.addEventListener("change", onChange);
    return select;
  };

  // -- tables ---------------------------------------------------------------------------------
  const compare = (a, b, numeric) => {
    if (!numeric) return a.localeCompare(b, undefined, { numeric: true, sensitivity: "base" });
    return a - b;
  };
  const sort = (table, column) => {
    const heads = [...table.tHead.rows[0].cells];
    const head = heads[column];
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach((other) => other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const numeric = head.classList.contains("number");
    const body = table.tBodies[0];
    const keyed = [...body.rows].map((row) => {
      const cell = row.cells[column];
      const value = numeric ? cell.dataset.value : cell.textContent.trim();
      return { row, missing: numeric && value === "", key: numeric ? Number(value) : value };
    });
    keyed.sort((a, b) => {
      if (a.missing || b.missing) return a.missing - b.missing; // at the end, either way
      return (up ? 1 : -1) * compare(a.key, b.key, numeric);
    });
    body.append(...keyed.map((item) => item.row));
  };
  document.querySelectorAll("table.sortable").forEach((table) => {
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      head.querySelector("button").addEventListener("click", () => sort(table, column));
    });
  });

  // -- forecast fans --------------------------------------------------------------------------
  const fans = (plot) => {
    const { series, windows, horizon, tail, x_title: title } = data.forecasts;
    const boxes = data.models.map((model, k) =>
      make("input", { type: "checkbox", value: k, ...(k === 0 ? { checked: "" } : {}) })
    );
    const update = () => {
      draw(plot, build);
      const s = series[picker.value];
      const gone = data.models.filter((_, k) => boxes[k].checked && !has(s.fans[origin.value][k]));
      byId("fans-missing").textContent = gone.length ? `No forecast here by ${gone.join(", ")}.` : "";
    };
    const has = (fan) => fan[0].some((value) => value !== null);
    const picker = choose("fans-series", series.map((s) => s.id), update);
    const name = (w) => `${w.number} of ${data.forecasts.n_windows}, after ${w.cutoff}`;
    const origin = choose("fans-window", windows.map(name), update);
    origin.value = windows.length - 1;
    byId("fans-models").append(
      ...data.models.map((model, k) =>
        make("label", {}, [
          boxes[k],
          make("span", { class: `key k${k % 8}`, "aria-hidden": "true" }),
          make("span", {}, [model]),
        ])
      )
    );
    boxes.forEach((box) => box.addEventListener("change", update));

    const fan = (s, start, k) => {
      const [mean, ...ends] = s.fans[origin.value][k];
      if (!boxes[k].checked || !has([mean])) return [];
      const hue = colour(data.models[k]);
      // The last observation is a forecast of no width: the fan is drawn from there.
      const joined = start > 0 && s.y[start - 1] !== null;
      const lead = joined ? [s.y[start - 1]] : [];
      const x = s.x.slice(start - lead.length, start + horizon);
      const bands = data.levels.flatMap((_, l) =>
        band(x, lead.concat(ends[2 * l]), lead.concat(ends[2 * l + 1]), faint(hue, 0.14 + 0.1 * l))
      );
      const inside = data.levels.map(
        (level, l) => `<br>${level} %: %{customdata[${2 * l}]} to %{customdata[${2 * l + 1}]}`
      );
      const line = {
        x,
        y: lead.concat(mean),
        mode: "lines",
        name: plain(data.models[k]),
        line: { color: hue, width: 2, dash: dashes[k % dashes.length] },
        customdata: lead.map(() => ends.map(() => "")).concat(mean.map((_, h) => ends.map((e) => e[h]))),
        hovertemplate: `%{x}<br>mean %{y:.5~g}${inside.join("")}`,
      };
      return [...bands, line];
    };
    const build = () => {
      const s = series[picker.value];
      const start = s.starts[origin.value];
      const past = Math.max(start - tail, 0);
      const held = s.y.slice(start, start + horizon);
      const traces = [
        {
          x: s.x.slice(past, start),
          y: s.y.slice(past, start),
          mode: "lines",
          name: "history",
          line: { color: css("--muted"), width: 1.3 },
          hovertemplate: "%{x}<br>%{y:.5~g}",
        },
        ...data.models.flatMap((_, k) => fan(s, start, k)),
        {
          x: s.x.slice(start, start + horizon),
          y: held,
          mode: "lines+markers",
          name: "held out",
          line: { color: css("--ink"), width: 1.2 },
          marker: { color: css("--ink"), size: 5 },
          hovertemplate: "%{x}<br>%{y:.5~g}",
        },
      ];
      const range = limits(s.y.slice(past, start).concat(held), traces);
      const y = axis(`${s.unit} (units of the data)`, range ? { range } : {});
      return [traces, layout(axis(title), y, { height: 400 })];
    };
    update();
  };
  // Keep the data legible: a fan may leave the picture, half the data's range off their ends.
  const limits = (shown, traces) => {
    const known = shown.filter((value) => value !== null);
    const all = traces.flatMap((trace) => trace.y).filter((value) => value !== null);
    if (!known.length) return null;
    const [low, high] = [Math.min(...known), Math.max(...known)];
    const room = high - low || Math.abs(high) || 1;
    const bottom = Math.max(Math.min(...all), low - 0.5 * room);
    const top = Math.min(Math.max(...all), high + 0.5 * room);
    return [bottom - 0.04 * room, top + 0.04 * room];
  };

  // -- ranks ----------------------------------------------------------------------------------
  const ranking = (plot) => {
    const { models, ranks, groups, difference } = data.ranks;
    const row = (k) => groups.length + k + 1; // under the axis: the bars, the models, the scale
    const last = row(models.length) + 0.3;
    const build = () => {
      const ink = css("--ink");
      const stems = models.map((_, k) => ({
        type: "path",
        path: `M 0.9,${row(k)} L ${ranks[k]},${row(k)} L ${ranks[k]},0`,
        line: { color: css("--muted"), width: 1 },
        layer: "below",
      }));
      const bars = groups.map((group, k) => {
        const ends = group.map((model) => ranks[models.indexOf(model)]);
        const [x0, x1] = [Math.min(...ends) - 0.03, Math.max(...ends) + 0.03];
        return { type: "line", x0, x1, y0: k + 0.6, y1: k + 0.6, line: { color: ink, width: 4 } };
      });
      const dots = {
        x: ranks,
        y: models.map((_, k) => row(k)),
        mode: "markers+text",
        text: ranks.map((rank) => rank.toFixed(2)),
        textposition: "middle right",
        textfont: { size: 11, color: css("--muted") },
        cliponaxis: false,
        marker: { color: models.map(colour), size: 9 },
        hovertext: models.map(plain),
        hovertemplate: "%{hovertext}<br>mean rank %{x:.3f}<extra></extra>",
      };
      const scale = {
        x: [1, 1 + difference],
        y: [last, last],
        mode: "lines+markers",
        line: { color: ink, width: 1.5 },
        marker: { symbol: "line-ns-open", size: 9, color: ink },
        hoverinfo: "skip",
      };
      const note = {
        x: 1,
        y: last,
        yshift: -6,
        xanchor: "left",
        yanchor: "top",
        showarrow: false,
        text: `critical difference ${difference.toFixed(2)}`,
        font: { size: 11, color: css("--muted") },
      };
      const x = axis("mean rank by CRPS (1 is best)", {
        side: "top",
        range: [0.9, Math.max(models.length, 1 + difference) + 0.35],
        dtick: 1,
        tick0: 1,
        ticks: "outside",
        tickcolor: css("--rule"),
        showline: true,
        fixedrange: true,
      });
      const y = {
        range: [last + 0.9, 0],
        tickvals: models.map((_, k) => row(k)),
        ticktext: models.map((model) => short(model)),
        tickfont: { size: 12, color: ink },
        automargin: true,
        showgrid: false,
        zeroline: false,
        fixedrange: true,
      };
      const more = { shapes: [...stems, ...bars], annotations: [note] };
      more.height = 80 + 25 * (last + 0.9);
      more.margin = { l: 20, r: 30, t: 50, b: 10 };
      return [[scale, dots], layout(x, y, more)];
    };
    draw(plot, build);
  };

  // -- calibration ----------------------------------------------------------------------------
  const transforms = (grid) => {
    data.pit.forEach((found) => {
      const count = found.density.length;
      const label = `Histogram of the probability integral transform of ${found.model}`;
      figure(grid, found.model, label, () => {
        const hue = colour(found.model);
        const top = Math.max(2, ...found.density, found.band[1]) * 1.05;
        const bars = {
          type: "bar",
          x: found.density.map((_, k) => (k + 0.5) / count),
          y: found.density,
          width: 1 / count,
          marker: { color: faint(hue, 0.55), line: { color: hue, width: 1 } },
          hovertemplate: "%{x:.2f}: density %{y:.2f}<extra></extra>",
        };
        const expected = { x: [0, 1], y: [1, 1], mode: "lines", hoverinfo: "skip" };
        expected.line = { color: css("--ink"), width: 1.2, dash: "dash" };
        const [low, high] = found.band.map((end) => [end, end]);
        const shade = faint(css("--ink"), 0.09);
        return [
          [bars, ...band([0, 1], low, high, shade), expected],
          layout(
            axis("transform of the held-out value", { range: [0, 1], dtick: 0.25 }),
            axis("density", { range: [0, top] }),
            { height: 210, bargap: 0 }
          ),
        ];
      });
    });
  };
  const coverage = (grid) => {
    data.coverage.forEach((found) => {
      const steps = found.count.map((_, k) => k + 1);
      const label = `Coverage of the ${found.level} % interval at each step of the horizon`;
      const shares = found.models.flatMap((own) => own.values).concat(found.low);
      const lowest = Math.min(...shares.filter((share) => share !== null));
      figure(grid, `${found.level} % interval`, label, () => {
        const lines = found.models.map((own, k) => ({
          x: steps,
          y: own.values,
          mode: "lines+markers",
          name: plain(own.model),
          line: { color: colour(own.model), width: 1.6, dash: dashes[k % dashes.length] },
          marker: { color: colour(own.model), size: 6, symbol: symbols[k % symbols.length] },
          hovertemplate: "step %{x}: %{y:.1f} %",
        }));
        const nominal = {
          x: [steps[0], steps[steps.length - 1]],
          y: [found.level, found.level],
          mode: "lines",
          line: { color: css("--ink"), width: 1.2, dash: "dash" },
          hoverinfo: "skip",
        };
        const shade = faint(css("--ink"), 0.09);
        return [
          [...band(steps, found.low, found.high, shade), nominal, ...lines],
          layout(
            axis("step of the horizon"),
            axis("held-out values inside, %", { range: [lowest - 5, 103] }),
            { height: 300 }
          ),
        ];
      });
    });
  };

  // -- states and training --------------------------------------------------------------------
  const joined = (before, after) =>
    Object.fromEntries(
      Object.keys(after).map((key) => [key, before[key].slice(-1).concat(after[key])])
    );
  const states = (grid) => {
    const update = () => {
      const model = data.states[models.value];
      const own = model.series[picker.value];
      [...drawn.keys()].filter((plot) => grid.contains(plot)).forEach((plot) => {
        Plotly.purge(plot);
        drawn.delete(plot);
      });
      grid.replaceChildren();
      own.states.forEach((state) => {
        const label = `State ${state.name} of ${model.model} for ${own.id}`;
        figure(grid, state.name, label, () => {
          const hue = colour(model.model);
          const curve = (given, dash, alpha, before) => {
            if (!given) return [];
            const part = before ? joined(before, given) : given;
            const low = part.mean.map((m, k) => (m === null ? null : m - part.half[k]));
            const high = part.mean.map((m, k) => (m === null ? null : m + part.half[k]));
            const mean = { x: part.x, y: part.mean, mode: "lines", customdata: part.half };
            mean.line = { color: hue, width: 1.8, dash };
            mean.hovertemplate = "%{x}<br>%{y:.5~g} \u00b1 %{customdata:.3~g}<extra></extra>";
            return [...band(part.x, low, high, faint(hue, alpha)), mean];
          };
          return [
            [
              ...curve(state.smoothed, "solid", 0.22),
              ...curve(state.predicted, "dot", 0.12, state.smoothed),
            ],
            layout(axis(data.forecasts.x_title), axis("state (model units)"), { height: 230 }),
          ];
        });
      });
    };
    const fill = () => {
      const names = data.states[models.value].series.map((own) => own.id);
      picker.replaceChildren(...names.map((name, k) => make("option", { value: k }, [name])));
    };
    const picker = choose("states-series", [], update);
    const models = choose("states-model", data.states.map((own) => own.model), () => {
      fill();
      update();
    });
    fill();
    update();
  };
  const training = (grid) => {
    data.training.forEach((found) => {
      const label = `Objective of ${found.model} at each ${found.step} of its fit`;
      figure(grid, found.model, label, () => {
        const hue = colour(found.model);
        const lines = [["objective", "training", hue, "solid"]];
        lines.push(["validation", "validation", css("--ink"), "dot"]);
        const traces = lines.filter(([kind]) => found[kind] && found[kind].x.length).map(
          ([kind, name, shade, dash]) => ({
            ...found[kind],
            mode: "lines",
            name,
            line: { color: shade, width: 1.7, dash },
            hovertemplate: `${found.step} %{x}: %{y:.5~g}`,
          })
        );
        const shapes = [];
        if (found.kept) {
          const line = { color: css("--muted"), width: 1, dash: "dash" };
          const at = found.kept.x[0];
          shapes.push({ type: "line", yref: "paper", x0: at, x1: at, y0: 0, y1: 1, line });
        }
        const range = settled(traces.flatMap((trace) => trace.y));
        const y = axis(`objective, ${found.unit}`, range ? { range } : {});
        const legend = { orientation: "h", x: 1, xanchor: "right", y: 0.02, yanchor: "bottom" };
        const more = { height: 240, shapes, legend, showlegend: traces.length > 1 };
        return [traces, layout(axis(found.step, { rangemode: "tozero" }), y, more)];
      });
    });
  };
  // The first iterations may be so far off that nothing else could be seen.
  const settled = (values) => {
    const known = values.filter((value) => value !== null).sort((a, b) => a - b);
    if (known.length < 10) return null;
    const high = known[known.length - 1];
    const low = known[Math.floor(known.length / 10)];
    const room = high - low || 1;
    return known[0] < low - 4 * room ? [low - room, high + 0.1 * room] : null;
  };

  for (const [id, ready, show] of [
    ["fans", data.forecasts.series.length, fans],
    ["ranking", data.ranks, ranking],
    ["transforms", data.pit.length, transforms],
    ["coverage", data.coverage.length, coverage],
    ["states", data.states.length, states],
    ["training", data.training.length, training],
  ]) {
    if (ready && byId(id)) show(byId(id));
  }

  // -- light, dark, paper ---------------------------------------------------------------------
  for (const query of ["(prefers-color-scheme: dark)", "print"]) {
    matchMedia(query).addEventListener("change", redraw);
  }
  const folded = [...document.querySelectorAll("details")];
  let open = [];
  addEventListener("beforeprint", () => {
    open = folded.map((one) => one.open);
    folded.forEach((one) => (one.open = true));
    root.classList.add("printing");
    redraw();
  });
  addEventListener("afterprint", () => {
    folded.forEach((one, k) => (one.open = open[k]));
    root.classList.remove("printing");
    redraw();
    drawn.forEach((_, element) => Plotly.Plots.resize(element)); // from the width of the paper
  });
  root.dataset.ready = "true";
})();
