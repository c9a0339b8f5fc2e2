// Curves over the layers: small multiples that share their axes (this prompt | ablation | control).
LS.lensStyles = {
  norm: { colour: "--norm", dash: "solid" },
  raw: { colour: "--raw", dash: "dash" },
  tuned: { colour: "--third", dash: "solid" },
  prism: { colour: "--fourth", dash: "solid" },
  temperature: { colour: "--norm", dash: "dot" },
  bias: { colour: "--third", dash: "dot" },
  jacobian: { colour: "--fifth", dash: "dashdot" },
};
// A lens that is not known here takes what a known one does not need in this table.
LS.lensStyle = (model, lens) => {
  if (LS.lensStyles[lens]) return LS.lensStyles[lens];
  const others = model.lenses.filter((name) => !LS.lensStyles[name]);
  const free = Object.keys(LS.lensStyles).filter((name) => !model.lenses.includes(name));
  return LS.lensStyles[free[others.indexOf(lens) % free.length] || "jacobian"];
};

// Whole layers only, and no more labels than fit beside one another in so many pixels.
LS.tickStep = (model, width) => [1, 2, 5, 10, 20, 50].find((step) => model.n_layers / step <= Math.min(14, width / 24)) || 100;

LS.panels = [
  { name: "entropy", title: "entropy (bits)" },
  { name: "kl", title: "KL to final (bits)" },
  { name: "rank", title: "answer rank", log: true },
];

LS.columnTitles = { fact: "original wording", ablation: "without filler", control: "control" };

LS.LABEL_FONT = 11;
LS.LABEL_LINE = 15;
LS.LABEL_CHAR = 6.3;

// One label per layer that holds milestones, each in a lane where it overlaps no other.
LS.lanes = (marks, toPixel, width) => {
  const groups = new Map();
  for (const [name, layer, stable] of marks) {
    const text = LS.label(name) + (stable === layer ? "" : stable === null ? " ✕" : " →" + stable);
    groups.set(layer, (groups.get(layer) || []).concat(text));
  }
  const taken = [];
  const free = (lane, a, b) => !(taken[lane] || []).some(([c, d]) => a < d && b > c);
  return [...groups.entries()]
    .sort((a, b) => b[0] - a[0])
    .map(([layer, names]) => {
      const x = toPixel(layer);
      const room = Math.max(x, width - x) - 14;
      const lines = LS.wrapped(names, Math.floor(room / LS.LABEL_CHAR));
      const size = LS.LABEL_CHAR * Math.max(...lines.map((line) => line.length)) + 14;
      const flip = x + size > width && x > width - x;
      const ends = flip ? [x - size, x + 4] : [x - 4, x + size];
      const fits = (lane) => lines.every((_, i) => free(lane + i, ...ends));
      let lane = 0;
      while (!fits(lane)) lane += 1;
      lines.forEach((_, i) => (taken[lane + i] = taken[lane + i] || []).push(ends));
      return { layer, lines, lane, flip, shift: flip ? -4 : 4, height: lane + lines.length };
    });
};

LS.wrapped = (names, room) => {
  const lines = [""];
  for (const name of names) {
    const joined = lines[lines.length - 1] ? lines[lines.length - 1] + " · " + name : name;
    if (joined.length > room && lines[lines.length - 1]) lines.push(name);
    else lines[lines.length - 1] = joined;
  }
  return lines;
};

LS.baseLayout = () => ({
  paper_bgcolor: "rgba(0,0,0,0)",
  plot_bgcolor: "rgba(0,0,0,0)",
  font: { family: "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif", size: 12, color: LS.css("--ink") },
  hoverlabel: { bgcolor: LS.css("--panel"), bordercolor: LS.css("--muted"), font: { color: LS.css("--ink"), size: 12 }, align: "left" },
  showlegend: false,
  hovermode: "x unified",
});

LS.axis = (extra) =>
  Object.assign(
    { gridcolor: LS.css("--line"), zeroline: false, linecolor: LS.css("--line"), showline: true, tickcolor: LS.css("--line"), fixedrange: true },
    extra,
  );

LS.plotConfig = { displaylogo: false, displayModeBar: false, responsive: false };

LS.curveColumns = (model, pass) => {
  const order = ["fact", "ablation", "control"].filter((kind) => kind !== pass.kind && kind in pass.beside);
  const others = order.map((kind) => model.passes.find((other) => other.index === pass.beside[kind]));
  return [pass].concat(others.filter(Boolean));
};

LS.hoverText = (model, curves, i) => {
  const tokens = curves.top[i].map(
    (token, rank) => LS.escaped(LS.short(model.strings[token])) + " " + LS.percent(curves.top_p[i][rank]),
  );
  return tokens.join(", ");
};

LS.curveTraces = (model, column, lens, panel, axes, chosen) => {
  const curves = column.lenses[lens] && column.lenses[lens].curves;
  if (!curves || !curves[panel.name]) return [];
  const style = LS.lensStyle(model, lens);
  const faint = model.lenses.length > 3 && lens !== chosen;
  return [
    {
      type: "scatter",
      mode: curves.layer.length > 40 ? "lines" : "lines+markers",
      name: lens,
      x: curves.layer,
      y: curves[panel.name],
      xaxis: axes.x,
      yaxis: axes.y,
      line: { color: LS.css(style.colour), width: faint ? 1.4 : 2.4, dash: style.dash },
      opacity: faint ? 0.75 : 1,
      marker: { size: faint ? 3 : 5 },
      customdata: curves.layer.map((_, i) => LS.hoverText(model, curves, i)),
      hovertemplate: LS.escaped(lens) + " <b>%{y:.4~g}</b>  %{customdata}<extra></extra>",
    },
  ];
};

LS.panelAxis = (panel, model, columns, first, domain, index) => {
  const top = Math.log10(model.d_vocab);
  const decades = [...Array(Math.floor(top) + 1).keys()].map((power) => 10 ** power);
  const shared = first ? {} : { matches: "y" + (index.base === 1 ? "" : index.base), showticklabels: false };
  const scale = panel.log
    ? { type: "log", range: [top + 0.1, -0.12], tickvals: decades, ticktext: decades.map((v) => v.toLocaleString("en")) }
    : { rangemode: "tozero", nticks: 6 };
  const title = first ? { title: { text: panel.title, font: { size: 12 }, standoff: 8 } } : {};
  return LS.axis(Object.assign({ domain, anchor: "x" + index.x }, scale, shared, title));
};

LS.drawCurves = (host, absent, model, pass, lens) => {
  absent.replaceChildren();
  const panels = LS.panels.filter((panel) => !pass.absent[panel.name]);
  for (const panel of LS.panels) if (pass.absent[panel.name]) absent.append(LS.sentence(pass.absent[panel.name]));
  for (const why of pass.absent.beside) absent.append(LS.sentence(why));
  host.hidden = panels.length === 0;
  if (!panels.length) return;
  const columns = LS.curveColumns(model, pass);
  const width = Math.max(host.clientWidth, 320 * columns.length);
  const left = 74;
  const gap = 26;
  const plotWidth = (width - left - 14 - gap * (columns.length - 1)) / columns.length;
  const span = [-0.3, model.n_layers + 0.3];
  const toPixel = (layer) => ((layer - span[0]) / (span[1] - span[0])) * plotWidth;
  const labels = columns.map((column) => LS.lanes((column.lenses[lens] || { marks: [] }).marks, toPixel, plotWidth));
  const lanes = Math.max(0, ...labels.flat().map((label) => label.height));
  const head = 44 + lanes * LS.LABEL_LINE;
  const panelHeight = 170;
  const inner = panels.length * panelHeight + (panels.length - 1) * 22;
  const layout = Object.assign(LS.baseLayout(), {
    width,
    height: head + inner + 46,
    margin: { l: left, r: 14, t: head, b: 46 },
    annotations: [],
    shapes: [],
  });
  const traces = [];
  const total = width - left - 14;
  columns.forEach((column, c) => {
    const domain = [(c * (plotWidth + gap)) / total, (c * (plotWidth + gap) + plotWidth) / total];
    panels.forEach((panel, r) => {
      const index = r * columns.length + c + 1;
      const suffix = index === 1 ? "" : String(index);
      const top = 1 - (r * (panelHeight + 22)) / inner;
      const bottom = r === panels.length - 1;
      layout["xaxis" + suffix] = LS.axis({
        domain, anchor: "y" + suffix, range: span, showticklabels: bottom, tick0: 0, dtick: LS.tickStep(model, plotWidth), tickangle: 0,
        unifiedhovertitle: { text: "layer %{x}" },
        title: bottom ? { text: "layer (0 = embedding)", font: { size: 12 }, standoff: 6 } : undefined,
      });
      layout["yaxis" + suffix] = LS.panelAxis(panel, model, columns, c === 0, [Math.max(0, top - panelHeight / inner), top], {
        x: suffix, base: r * columns.length + 1,
      });
      for (const name of model.lenses) traces.push(...LS.curveTraces(model, column, name, panel, { x: "x" + suffix, y: "y" + suffix }, lens));
    });
    LS.decorate(layout, column, labels[c], domain, { columns: columns.length, c, rows: panels.length, inner, lanes, lead: c === 0 });
  });
  LS.curveLegend(layout, model);
  Plotly.react(host, traces, layout, LS.plotConfig);
};

// Column title, milestone labels above the first panel, and one line per layer through all panels.
LS.decorate = (layout, column, labels, domain, at) => {
  const name = (at.lead ? "<b>" : "") + LS.escaped(column.title) + (at.lead ? "</b>" : "");
  const kind = column.kind === "fact" ? " · " + LS.columnTitles.fact : "";
  layout.annotations.push({
    text: name + kind, xref: "paper", yref: "paper", x: domain[0], y: 1, xanchor: "left", yanchor: "bottom",
    yshift: at.lanes * LS.LABEL_LINE + 4, showarrow: false, font: { size: 13 },
  });
  const axis = at.c === 0 ? "x" : "x" + (at.c + 1);
  for (const label of labels) {
    layout.annotations.push({
      text: label.lines.map(LS.escaped).join("<br>"), xref: axis, yref: "paper", x: label.layer, y: 1, yanchor: "bottom",
      xanchor: label.flip ? "right" : "left", align: label.flip ? "right" : "left", xshift: label.shift, yshift: label.lane * LS.LABEL_LINE,
      showarrow: false, font: { size: LS.LABEL_FONT, color: LS.css("--muted") }, bgcolor: LS.css("--bg"), borderpad: 0,
    });
    layout.shapes.push({
      type: "line", xref: axis, yref: "paper", x0: label.layer, x1: label.layer, y0: 0, layer: "between",
      y1: 1 + (label.height * LS.LABEL_LINE) / at.inner, line: { color: LS.css("--muted"), width: 1, dash: "dot" }, opacity: 0.8,
    });
  }
};

LS.curveLegend = (layout, model) => {
  const text = model.lenses
    .map((lens) => {
      const style = LS.lensStyle(model, lens);
      const line = { solid: "━━", dash: "╍╍", dot: "•••", dashdot: "━·" }[style.dash];
      return '<span style="color:' + LS.css(style.colour) + '">' + line + "</span> " + LS.escaped(lens);
    })
    .join("   ");
  layout.annotations.push({
    text, xref: "paper", yref: "paper", x: 1, y: 1, xanchor: "right", yanchor: "bottom",
    yshift: layout.margin.t - 20, showarrow: false,
  });
};

LS.rawPanels = [
  { name: "kl_raw", title: "KL(norm‖raw), bits" },
  { name: "js_raw", title: "Jensen-Shannon, bits", range: [0, 1.03] },
  { name: "jaccard_raw", title: "top-50 overlap (Jaccard)", range: [0, 1.03] },
];

LS.drawRaw = (host, model, pass) => {
  if (pass.absent.raw) {
    Plotly.purge(host);
    host.replaceChildren(LS.sentence(pass.absent.raw));
    return;
  }
  if (host.querySelector(".absent")) host.replaceChildren();
  const curves = pass.lenses.norm.curves;
  const panels = LS.rawPanels.filter((panel) => curves[panel.name]);
  const width = Math.max(host.clientWidth, 640);
  const layout = Object.assign(LS.baseLayout(), {
    width, height: 250, margin: { l: 50, r: 14, t: 34, b: 44 }, annotations: [], grid: { rows: 1, columns: panels.length, pattern: "independent", xgap: 0.12 },
  });
  const traces = panels.map((panel, i) => {
    const suffix = i === 0 ? "" : String(i + 1);
    layout["xaxis" + suffix] = LS.axis({
      range: [-0.3, model.n_layers + 0.3], tick0: 0, dtick: LS.tickStep(model, (0.85 * width) / panels.length), tickangle: 0, unifiedhovertitle: { text: "layer %{x}" },
      title: { text: "layer", font: { size: 12 }, standoff: 6 },
    });
    layout["yaxis" + suffix] = LS.axis(panel.range ? { range: panel.range } : { rangemode: "tozero" });
    layout.annotations.push({
      text: panel.title, xref: "x" + suffix + " domain", yref: "paper", x: 0, y: 1, xanchor: "left", yanchor: "bottom", yshift: 6, showarrow: false, font: { size: 13 },
    });
    return {
      type: "scatter", mode: curves.layer.length > 40 ? "lines" : "lines+markers", x: curves.layer, y: curves[panel.name],
      xaxis: "x" + suffix, yaxis: "y" + suffix, line: { color: LS.css("--fourth"), width: 2 }, marker: { size: 5 },
      hovertemplate: "<b>%{y:.4~g}</b><extra></extra>",
    };
  });
  Plotly.react(host, traces, layout, LS.plotConfig);
};
