"use strict";
(() => {
  const facts = JSON.parse(document.getElementById("facts").textContent);
  const page = document.getElementById("page");
  const charts = [];
  const afterwards = [];

  // ---- Small helpers ----

  const add = (parent, tag, text, attributes) => {
    const element = document.createElement(tag);
    if (text !== undefined && text !== null) element.textContent = text;
    Object.assign(element, attributes || {});
    parent.append(element);
    return element;
  };
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const whole = (number) => Math.round(number).toLocaleString("en-US");
  const percent = (part, all) => (all ? ((100 * part) / all).toFixed(1) + " %" : "-");
  const visible = (text) => text.replace(/\n/g, "\u21b5").replace(/\t/g, "\u21e5").replace(/ /g, "\u00b7");
  const short = (text, most) => (text.length > most ? text.slice(0, most - 1) + "\u2026" : text);
  const name = (prefix) => (prefix === "" ? "no metadata" : prefix.trim().replace(/\s*\n\s*/g, " | "));
  // Plotly reads tags such as <b> in its texts.
  const escaped = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

  const section = (id, title, text) => {
    const element = add(page, "section", null, { id });
    add(element, "h2", title);
    if (text) add(element, "p", text);
    return element;
  };
  const table = (parent, head, rows) => {
    const box = add(parent, "div", null, { className: "scroll" });
    const element = add(box, "table");
    const top = add(add(element, "thead"), "tr");
    head.forEach((cell) => add(top, "th", cell));
    const body = add(element, "tbody");
    rows.forEach((row) => {
      const line = add(body, "tr");
      row.forEach((cell) => add(line, "td", cell));
    });
    return element;
  };
  const numbers = (parent, head, rows) => {
    const element = add(parent, "details");
    add(element, "summary", "The numbers");
    table(element, head, rows);
  };
  const chart = (parent, id, height, make) => {
    const element = add(parent, "div", null, { id, className: "chart" });
    element.style.height = height + "px";
    const draw = () => {
      const [traces, layout] = make();
      const line = colour("--line");
      const axis = { gridcolor: line, zerolinecolor: line, automargin: true };
      return Plotly.react(
        element,
        traces,
        {
          paper_bgcolor: "rgba(0,0,0,0)",
          plot_bgcolor: "rgba(0,0,0,0)",
          font: { color: colour("--ink"), family: "system-ui, sans-serif", size: 12 },
          margin: { l: 50, r: 10, t: 10, b: 40 },
          legend: { orientation: "h", y: 1.02, yanchor: "bottom" },
          hoverlabel: { align: "left" },
          ...layout,
          xaxis: { ...axis, ...(layout.xaxis || {}) },
          yaxis: { ...axis, ...(layout.yaxis || {}) },
        },
        { responsive: true, displaylogo: false, displayModeBar: false },
      );
    };
    charts.push(draw);
    return { element, draw };
  };

  // ---- Sections ----

  const corpus = (each, number) => {
    const part = section(`corpus-${number}`, `Corpus ${each.prefix}`);
    const tiles = add(part, "div", null, { className: "tiles" });
    const tile = (value, label) => {
      const element = add(tiles, "div", null, { className: "tile" });
      add(element, "strong", value);
      add(element, "span", label);
    };
    tile(whole(each.documents), "documents");
    tile(whole(each.tokens), "tokens");
    tile(each.documents ? (each.tokens / each.documents).toFixed(1) : "-", "tokens per document");
    add(part, "h3", "Length");
    const bins = each.lengths.map((bin) => (bin.to - bin.from > 1 ? `${whole(bin.from)}-${whole(bin.to - 1)}` : whole(bin.from)));
    chart(part, `lengths-${number}`, 260, () => [
      ["documents", "tokens"].map((what, i) => ({
        type: "bar",
        name: `share of ${what}`,
        x: bins,
        y: each.lengths.map((bin) => bin[what] / (each[what] || 1)),
        customdata: each.lengths.map((bin) => whole(bin[what])),
        hovertemplate: `%{x} tokens: %{customdata} ${what}, %{y:.1%}<extra></extra>`,
        marker: { color: colour(i ? "--u" : "--t") },
      })),
      { barmode: "group", xaxis: { title: { text: "tokens of a document" }, type: "category" }, yaxis: { tickformat: ".0%" } },
    ]);
    numbers(part, ["tokens of a document", "documents", "tokens"], each.lengths.map((bin, i) => [bins[i], whole(bin.documents), whole(bin.tokens)]));
    each.fields.forEach((field, i) => {
      const what = field.by === "host" ? `Hosts of ${field.name}` : field.name;
      add(part, "h3", `${what}: ${field.is_exact ? "" : "more than "}${whole(field.distinct)} distinct`);
      if (field.documents_without) add(part, "p", `${whole(field.documents_without)} documents have none.`);
      if (!field.is_exact) add(part, "p", "The rarest values were dropped while counting: counts of rare values are lower bounds.");
      if (!field.values.length) return;
      const shown = field.values.slice(0, 15);
      chart(part, `field-${number}-${i}`, 60 + 22 * shown.length, () => [
        [{
          type: "bar",
          orientation: "h",
          y: shown.map((v) => escaped(short(v.value, 40))).reverse(),
          x: shown.map((v) => v.tokens).reverse(),
          customdata: shown.map((v) => [escaped(short(v.value, 200)), whole(v.documents)]).reverse(),
          hovertemplate: "%{customdata[0]}: %{x:,} tokens, %{customdata[1]} documents<extra></extra>",
          marker: { color: colour("--t") },
        }],
        { xaxis: { title: { text: "tokens" } }, yaxis: { type: "category" } },
      ]);
      numbers(
        part,
        [field.by === "host" ? "host" : field.name, "documents", "tokens", "share of tokens"],
        field.values.map((v) => [v.value, whole(v.documents), whole(v.tokens), percent(v.tokens, each.tokens)]),
      );
    });
  };

  const plan = (report) => {
    const part = section("plan", "Plan", `${whole(report.num_iterations)} iterations, ${whole(report.num_samples)} samples. ${report.start_iteration ? `Metadata begin after iteration ${whole(report.start_iteration)}, with sample ${whole(report.start_sample)}. ` : ""}The cooldown begins after iteration ${whole(report.switch_iteration)}, with sample ${whole(report.switch_sample)}.`);
    const phases = Object.entries(report.phases).filter(([, c]) => c.packs);
    const rows = [
      ["documents", "documents"], ["packs", "packs"], ["body tokens", "body_tokens"], ["prefix tokens", "prefix_tokens"],
      ["suffix tokens", "suffix_tokens"], ["padding", "padding_tokens"], ["discarded tokens", "discarded_tokens"],
      ["documents cut", "documents_cut"], ["documents without prefix", "documents_plain"], ["epochs", "num_epochs"],
    ].filter(([, key]) => phases.some(([, c]) => c[key] !== undefined));
    table(part, ["", ...phases.map(([phase]) => phase)], rows.map(([label, key]) => [label, ...phases.map(([, c]) => whole(c[key] || 0))]));
  };

  const packs = (report) => {
    const list = report.packs;
    const part = section("packs", "Packs", `Training samples on both sides of ${report.start_sample ? "both switches" : "the switch"}. Each row of the first picture is one sample; the slider chooses the sample of the second one. Point at a token for its text, its document, its position and whether it is in the loss.`);
    const key = add(part, "div", null, { className: "key" });
    [["--b", "BOS"], ["--p", "prefix"], ["--t", "text"], ["--u", "text of the next document"], ["--e", "suffix"], ["--pad", "padding"]].forEach(([variable, label]) => {
      if (label === "suffix" && !list.some((pack) => pack.kinds.includes("s"))) return;
      const entry = add(key, "span");
      add(entry, "i").style.background = `var(${variable})`;
      entry.append(label);
    });
    const length = list[0].tokens.length;
    // The kind of each token as a number: 0 padding, 1 BOS, 2 prefix, 3 and 4 text, 5 suffix.
    const codes = list.map((pack) => {
      const kinds = [...pack.kinds].map((kind) => ({ ".": 0, b: 1, p: 2, t: 3, s: 5 })[kind]);
      pack.documents.forEach((document, i) => {
        if (i % 2) for (let at = document.begin; at < document.end; at++) if (kinds[at] === 3) kinds[at] = 4;
      });
      return kinds;
    });
    const owners = list.map((pack) => {
      const owner = new Array(length).fill(-1);
      pack.documents.forEach((document, i) => owner.fill(i, document.begin, document.end));
      return owner;
    });
    const words = { ".": "padding", b: "BOS", p: "prefix", t: "text", s: "suffix" };
    const hover = (p, at) => {
      const pack = list[p];
      const document = pack.documents[owners[p][at]];
      const lines = [`<b>${escaped(visible(report.vocabulary[pack.tokens[at]]))}</b> (id ${pack.tokens[at]}, ${words[pack.kinds[at]]})`];
      if (document) {
        lines.push(`document ${whole(document.document)}, position ${pack.positions[at]}`);
        lines.push(escaped(document.prefix === null ? "no metadata" : short(name(document.prefix), 80)));
      }
      lines.push(pack.in_loss[at] === "1" ? "predicts the next token, in the loss" : "the next token is not in the loss");
      return lines.join("<br>");
    };
    const scale = (names) => {
      const steps = [];
      names.forEach((variable, i) => steps.push([i / names.length, colour(variable)], [(i + 1) / names.length, colour(variable)]));
      return steps;
    };
    const kindScale = () => ({ colorscale: scale(["--pad", "--b", "--p", "--t", "--u", "--e"]), zmin: -0.5, zmax: 5.5, showscale: false });
    const label = (pack) => `${pack.phase} ${whole(pack.sample)}`;
    const texts = list.map((pack, p) => pack.tokens.map((_, at) => hover(p, at)));
    const overview = chart(part, "strips", 80 + 18 * list.length, () => {
      const lines = [report.start_sample, report.switch_sample]
        .filter((switched) => switched !== undefined)
        .map((switched) => list.findIndex((pack) => pack.sample >= switched))
        .filter((after) => after > 0)
        .map((after) => ({ type: "line", x0: -0.5, x1: length - 0.5, y0: after - 0.5, y1: after - 0.5, line: { color: colour("--ink"), width: 2, dash: "dot" } }));
      return [
        [{ type: "heatmap", z: codes, y: list.map(label), text: texts, hovertemplate: "%{text}<extra>%{y}</extra>", ...kindScale() }],
        { shapes: lines, yaxis: { autorange: "reversed", type: "category", ticks: "" }, xaxis: { title: { text: "token of the sample" } } },
      ];
    });
    const controls = add(part, "div", null, { className: "controls" });
    const slider = add(controls, "input", null, { type: "range", id: "sample", min: 0, max: list.length - 1, value: 0 });
    slider.setAttribute("aria-label", "sample");
    const caption = add(controls, "output", null, { id: "caption" });
    const view = add(controls, "select", null, { id: "view" });
    view.setAttribute("aria-label", "colour");
    [["kind", "colour: kind and document"], ["loss", "colour: in the loss"], ["position", "colour: position in its document"]].forEach(([value, text]) => add(view, "option", text, { value }));
    const width = Math.min(length, length > 4096 ? 128 : length > 512 ? 64 : 32);
    const rows = Math.ceil(length / width);
    const fold = (values) => Array.from({ length: rows }, (_, row) => Array.from(values.slice(row * width, (row + 1) * width)));
    const grid = chart(part, "pack", Math.max(220, Math.min(760, 60 + 14 * rows)), () => {
      const p = Number(slider.value);
      const looks = {
        kind: () => ({ z: fold(codes[p]), ...kindScale() }),
        loss: () => ({ z: fold([...list[p].in_loss].map(Number)), colorscale: scale(["--pad", "--u"]), zmin: -0.5, zmax: 1.5, showscale: false }),
        position: () => ({ z: fold(list[p].positions), colorscale: "Viridis", showscale: true, colorbar: { thickness: 10 } }),
      };
      return [
        [{ type: "heatmap", xgap: 1, ygap: 1, text: fold(texts[p]), hovertemplate: "%{text}<extra></extra>", y0: 0, dy: width, ...looks[view.value]() }],
        { yaxis: { autorange: "reversed", title: { text: "first token of the row" } }, xaxis: { title: { text: "token within the row" } }, margin: { l: 60, r: 10, t: 10, b: 40 } },
      ];
    });
    const documents = add(part, "div", null, { className: "documents", id: "documents" });
    const describe = () => {
      const pack = list[Number(slider.value)];
      const trained = [...pack.in_loss].filter((bit) => bit === "1").length;
      caption.textContent = `sample ${whole(pack.sample)}, ${pack.phase}, ${pack.documents.length} documents, ${whole(trained)} of ${whole(length)} tokens in the loss`;
      documents.replaceChildren();
      pack.documents.slice(0, 40).forEach((document, i) => {
        const element = add(documents, "div", null, { className: i % 2 ? "document odd" : "document" });
        add(element, "small", `document ${whole(document.document)}, tokens ${whole(document.begin)} to ${whole(document.end)}${document.body_begin ? `, continued from token ${whole(document.body_begin)}` : ""}`);
        if (document.prefix) add(element, "b", document.prefix);
        element.append(document.text);
        if (document.suffix) add(element, "b", document.suffix);
      });
      if (pack.documents.length > 40) add(documents, "p", `and ${pack.documents.length - 40} more`);
    };
    const choose = () => {
      describe();
      grid.draw();
    };
    describe();
    slider.addEventListener("input", choose);
    view.addEventListener("change", () => grid.draw());
    afterwards.push(() =>
      overview.element.on("plotly_click", (event) => {
        slider.value = event.points[0].pointIndex[0];
        choose();
      }),
    );
  };

  const palette = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"];
  const views = { conditioned: "right metadata", shuffled: "wrong metadata", plain: "no metadata", "": "validation" };
  const dashes = { conditioned: "solid", shuffled: "dot", plain: "dash", "": "solid" };

  const losses = (runs) => {
    const part = section("losses", "Losses", `Nats per token. Validation uses the same tokens in each view: under their own metadata, under another document's, and under none. Only the difference between wrong and right is the value of metadata${runs.some((run) => run.start) ? "" : ": before the cooldown a model has seen no plain documents, and any metadata helps it"}. Each evaluation takes other documents: compare the lines at one iteration, not one line over iterations.`);
    const switches = () => runs.flatMap((run) => [run.start, run.switch]).filter((at) => at).map((at) => ({ type: "line", x0: at, x1: at, y0: 0, y1: 1, yref: "paper", line: { color: colour("--soft"), width: 1, dash: "dot" } }));
    add(part, "h3", "Training");
    chart(part, "training", 300, () => [
      runs.map((run, i) => ({ type: "scatter", mode: "lines", name: escaped(run.name), x: run.steps.iteration, y: run.steps.loss, line: { width: 1.5, color: palette[i % 6] }, hovertemplate: "iteration %{x}: %{y:.4f}" })),
      { shapes: switches(), xaxis: { title: { text: "iteration" } }, yaxis: { title: { text: "loss" } }, showlegend: true },
    ]);
    const kinds = (run) => Object.keys(views).filter((kind) => run.validations.some((v) => v.losses[kind] !== undefined));
    if (!runs.some((run) => run.validations.length)) return;
    add(part, "h3", "Validation");
    chart(part, "validation", 320, () => [
      runs.flatMap((run, i) => kinds(run).map((kind) => ({
        type: "scatter", mode: "lines+markers", name: escaped(`${run.name}: ${views[kind]}`),
        x: run.validations.map((v) => v.iteration), y: run.validations.map((v) => v.losses[kind]),
        line: { color: palette[i % 6], dash: dashes[kind], width: 1.5 }, marker: { size: 5 }, hovertemplate: "iteration %{x}: %{y:.4f}",
      }))),
      { shapes: switches(), xaxis: { title: { text: "iteration" } }, yaxis: { title: { text: "loss" } } },
    ]);
    const value = "shuffled minus conditioned";
    const three = runs.filter((run) => run.validations.some((v) => v.losses[value] !== undefined));
    if (three.length) {
      add(part, "h3", "Value of metadata: loss under wrong minus loss under right metadata");
      chart(part, "value", 260, () => [
        three.map((run, i) => ({ type: "scatter", mode: "lines+markers", name: escaped(run.name), x: run.validations.map((v) => v.iteration), y: run.validations.map((v) => v.losses[value]), line: { color: palette[i % 6] }, hovertemplate: "iteration %{x}: %{y:.4f}" })),
        { shapes: switches(), xaxis: { title: { text: "iteration" } }, yaxis: { title: { text: "nats per token" } }, showlegend: true },
      ]);
    }
    runs.forEach((run) => {
      if (!run.validations.length) return;
      add(part, "h3", run.name);
      const columns = { ...Object.fromEntries(kinds(run).map((kind) => [kind, views[kind]])), ...(three.includes(run) ? { [value]: "wrong minus right" } : {}) };
      numbers(part, ["iteration", ...Object.values(columns)], run.validations.map((v) => [whole(v.iteration), ...Object.keys(columns).map((kind) => (v.losses[kind] ?? NaN).toFixed(4))]));
    });
  };

  const matrices = (list) => {
    const part = section("matrix", "Held-out texts under each source's metadata", "Rows: where the texts come from. Columns: the metadata that the model is given. The colour is the loss minus the row's mean over the sources' metadata: blue is better than that mean. All models share one scale.");
    const centre = (row) => {
      const mean = row.slice(0, -1).reduce((sum, x) => sum + x, 0) / (row.length - 1);
      return row.map((x) => x - mean);
    };
    // One scale for all models, so that colours can be compared.
    const most = Math.max(1e-9, ...list.flatMap((each) => each.loss.flatMap(centre)).map(Math.abs));
    list.forEach((each, number) => {
      add(part, "h3", each.name);
      const value = each.wrong_minus_right;
      add(part, "p", `Wrong minus right metadata: ${value.mean.toFixed(4)} nats per token, standard error ${value.stderr.toFixed(4)}, over ${value.texts} texts.`);
      const names = each.sources.map(name);
      const columns = [...names, "no metadata"];
      const centred = each.loss.map(centre);
      chart(part, `matrix-${number}`, 160 + 34 * names.length, () => [
        [{
          type: "heatmap", z: centred, x: columns.map((x) => escaped(short(x, 24))), y: names.map((x) => escaped(short(x, 24))),
          customdata: each.loss, zmin: -most, zmax: most, colorscale: [[0, "#0072b2"], [0.5, colour("--card")], [1, "#d55e00"]],
          texttemplate: "%{z:+.2f}", hovertemplate: "texts of %{y}<br>under %{x}<br>loss %{customdata:.4f}, %{z:+.4f} against the row<extra></extra>",
          colorbar: { thickness: 10 },
        }],
        { yaxis: { autorange: "reversed", type: "category" }, xaxis: { type: "category", tickangle: -35 } },
      ]);
      numbers(part, ["texts of", "texts", ...columns], each.loss.map((row, i) => [names[i], each.texts[i], ...row.map((x) => x.toFixed(4))]));
    });
  };

  const generations = (list) => {
    const part = section("generations", "Generations", "The same prompt and seed under each metadata. Nothing was selected.");
    list.forEach((row) => {
      add(part, "h3", `${row.model}: ${row.prompt ? JSON.stringify(row.prompt) : "empty prompt"}, seed ${row.seed}`);
      const columns = add(part, "div", null, { className: "columns" });
      row.columns.forEach((column) => {
        const element = add(columns, "div", null, { className: "column" });
        add(element, "b", name(column.prefix));
        element.append(row.prompt + column.text);
      });
    });
  };

  add(page, "h1", facts.title);
  add(page, "p", `Made by meco show, megatron-meco ${facts.version}. All numbers are in this page as JSON, in the element with the id "facts".`);
  if (facts.generations && facts.generations.length) generations(facts.generations);
  if (facts.matrices && facts.matrices.length) matrices(facts.matrices);
  if (facts.curves && facts.curves.length) losses(facts.curves);
  if (facts.packs && facts.packs.packs.length) packs(facts.packs);
  if (facts.plan) plan(facts.plan);
  (facts.corpora || []).forEach(corpus);
  const drawAll = () => Promise.all(charts.map((draw) => draw()));
  drawAll().then(() => {
    afterwards.forEach((attach) => attach());
    document.body.dataset.ready = "yes";
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
})();
