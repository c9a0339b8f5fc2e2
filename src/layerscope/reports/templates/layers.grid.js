// The layers x positions grid: an ordinary table, so that it can be read with the keyboard.
LS.CHIP_CHARS = 26;

LS.label = (name) => (LS.data.milestones[name] || [name])[0];

// As many milestone names as fit in the room beside a layer number.
LS.fitting = (names) => {
  let room = LS.CHIP_CHARS;
  return names.filter((name) => (room -= LS.label(name).length + 1) >= 0);
};

LS.sideWidth = (grid, byLayer) => {
  const sizes = grid.layers.map((layer) => {
    const names = byLayer.get(layer) || [];
    const shown = LS.fitting(names);
    const more = shown.length < names.length ? 26 : 0;
    return shown.reduce((sum, name) => sum + 6.4 * LS.label(name).length + 12, more);
  });
  return Math.max(116, 44 + Math.max(...sizes));
};

LS.colourModes = {
  probability: {
    label: "Probability",
    value: (grid, cell) => grid.p[cell * grid.k],
    position: (value) => value,
    ends: () => ["0", "1 (top-1 probability)"],
  },
  entropy: {
    label: "Entropy",
    value: (grid, cell) => grid.h[cell],
    position: (value, model) => 1 - value / Math.log2(model.d_vocab),
    ends: (model) => [LS.number(Math.log2(model.d_vocab)) + " bits (uniform)", "0 bits (certain)"],
  },
};

LS.marksByLayer = (marks) => {
  const byLayer = new Map();
  for (const [name, first] of marks) byLayer.set(first, (byLayer.get(first) || []).concat(name));
  return byLayer;
};

LS.rowHeader = (layer, model, names) => {
  const header = LS.element("th");
  header.scope = "row";
  const shown = LS.fitting(names);
  for (const name of shown) header.append(LS.element("span", "mark", LS.label(name)));
  if (shown.length < names.length) {
    header.append(LS.element("span", "mark", "+" + (names.length - shown.length)));
  }
  header.append(LS.element("b", "", String(layer)));
  const where = layer === 0 ? "embedding" : layer === model.n_layers ? "last layer" : "layer " + layer;
  header.title = [where].concat(names.map(LS.label)).join(" · ");
  return header;
};

LS.drawGrid = (host, legend, model, pass, lens, colour) => {
  host.replaceChildren();
  legend.replaceChildren();
  const entry = pass.lenses[lens];
  const grid = entry && entry.grid;
  if (!grid || !grid.k) {
    const why = pass.absent.grid || "The table holds no top tokens for this prompt under this lens.";
    host.replaceChildren(LS.sentence(why));
    return;
  }
  const mode = LS.colourModes[colour];
  const columns = grid.pos.length;
  const top = grid.layers.length - 1;
  const finals = grid.pos.map((_, column) => LS.finalToken(pass, entry, top, column));
  const answers = LS.answerLayers(entry.curves);
  const byLayer = LS.marksByLayer(entry.marks);
  const table = LS.element("table");
  const layout = LS.element("colgroup");
  layout.append(LS.element("col"));
  const side = LS.sideWidth(grid, byLayer);
  layout.firstChild.style.width = side + "px";
  const drawn = columns === 1 ? Math.min(grid.k, LS.RUNNERS_UP + 1) : columns;
  for (let i = 0; i < drawn; i += 1) layout.append(LS.element("col"));
  const body = LS.element("tbody");
  for (let row = top; row >= 0; row -= 1) {
    const line = LS.element("tr");
    line.append(LS.rowHeader(grid.layers[row], model, byLayer.get(grid.layers[row]) || []));
    for (let column = 0; column < columns; column += 1) {
      line.append(LS.gridCell(model, pass, grid, row, column, mode, finals[column], answers));
    }
    if (columns === 1) line.append(...LS.runnersUp(model, grid, row));
    body.append(line);
  }
  table.append(layout, body, LS.gridFoot(model, pass, grid));
  table.style.minWidth = side + 60 * drawn + "px";
  table.style.maxWidth = side + 200 * drawn + "px";
  host.append(table);
  host.scrollLeft = host.scrollWidth;
  LS.gridKeys(table, top + 1, columns);
  LS.gridLegend(legend, mode, model, grid);
};

// The model's own top-1 at a position: its head where that was recorded, else the last layer
// of the norm lens, which is what the head reads.
LS.finalToken = (pass, entry, top, column) => {
  const grid = entry.grid;
  if (grid.pos[column] === pass.tokens.length - 1 && pass.head) return pass.head.tokens[0];
  const at = top * grid.pos.length + column;
  if (grid.r[at] === 1) return grid.t[at * grid.k];
  const norm = pass.lenses.norm && pass.lenses.norm.grid;
  return grid.r[at] === null && norm && norm.k ? norm.t[at * norm.k] : null;
};

LS.answerLayers = (curves) => new Set(curves.layer.filter((_, i) => curves.rank && curves.rank[i] === 1));

LS.gridCell = (model, pass, grid, row, column, mode, final, answers) => {
  const cell = row * grid.pos.length + column;
  const token = grid.t[cell * grid.k];
  const node = LS.element("td", "", token >= 0 ? model.strings[token] : "");
  const isLast = column === grid.pos.length - 1;
  const value = mode.value(grid, cell);
  if (value !== null && value !== undefined) {
    const rgb = LS.rgb(mode.position(value, model));
    node.style.background = "rgb(" + rgb.join(",") + ")";
    node.style.color = LS.ink(rgb);
  }
  if (token >= 0 && (grid.r[cell] === 1 || token === final)) node.classList.add("final");
  if (isLast) {
    node.classList.add("last");
    if (answers.has(grid.layers[row])) node.classList.add("answer");
  }
  node.tabIndex = row === grid.layers.length - 1 && column === grid.pos.length - 1 ? 0 : -1;
  const show = () => LS.showTip(node, LS.tipContent(model, pass, grid, row, column));
  node.addEventListener("mouseenter", show);
  node.addEventListener("focus", show);
  node.addEventListener("mouseleave", LS.hideTip);
  node.addEventListener("blur", LS.hideTip);
  return node;
};

// With one position there is room for the next most likely tokens beside the first.
LS.RUNNERS_UP = 4;
LS.runnersUp = (model, grid, row) => {
  const cells = [];
  for (let i = 1; i < Math.min(grid.k, LS.RUNNERS_UP + 1); i += 1) {
    const token = grid.t[row * grid.k + i];
    const text = token < 0 ? "" : model.strings[token] + "  " + LS.percent(grid.p[row * grid.k + i]);
    cells.push(LS.element("td", "next", text));
  }
  return cells;
};

LS.gridFoot = (model, pass, grid) => {
  const foot = LS.element("tfoot");
  const line = LS.element("tr");
  line.append(LS.element("th", "", "prompt token →"));
  for (const position of grid.pos) {
    const isLast = position === grid.pos[grid.pos.length - 1];
    const text = model.strings[pass.tokens[position]];
    const header = LS.element("th", isLast ? "last" : "", text === undefined ? "position " + position : text);
    header.scope = "col";
    header.title = "position " + position + ": " + header.textContent;
    line.append(header);
  }
  if (grid.pos.length === 1) {
    for (let i = 2; i <= Math.min(grid.k, LS.RUNNERS_UP + 1); i += 1) line.append(LS.element("th", "next", "rank " + i));
  }
  foot.append(line);
  return foot;
};

LS.gridLegend = (legend, mode, model, grid) => {
  const [low, high] = mode.ends(model);
  const ramp = LS.element("span", "ramp");
  const bar = LS.element("i");
  bar.style.background = "linear-gradient(90deg," + LS.scale.join(",") + ")";
  ramp.append(LS.element("span", "", low), bar, LS.element("span", "", high));
  const final = LS.element("span");
  final.append(LS.element("span", "key final", "a"), "what the model itself predicts there");
  const answer = LS.element("span");
  answer.append(LS.element("span", "key answer", "a"), "the answer");
  legend.append(ramp, final, answer);
  if (grid.hidden) {
    legend.append(LS.element("span", "", "The first " + grid.hidden + " positions of this long prompt are not drawn."));
  }
  if (grid.pos.length === 1) {
    legend.append(LS.element("span", "", "Only the last position was decoded; beside it stand the next most likely tokens."));
  }
};

LS.gridKeys = (table, rows, columns) => {
  table.addEventListener("keydown", (event) => {
    const cells = [...table.querySelectorAll("td[tabindex]")];
    const at = cells.indexOf(document.activeElement);
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns };
    if (event.key === "Escape") LS.hideTip();
    if (at < 0 || !(event.key in steps)) return;
    const to = at + steps[event.key];
    const sameRow = Math.floor(to / columns) === Math.floor(at / columns);
    if (to < 0 || to >= rows * columns || (Math.abs(steps[event.key]) === 1 && !sameRow)) return;
    event.preventDefault();
    cells[at].tabIndex = -1;
    cells[to].tabIndex = 0;
    cells[to].focus();
  });
};

LS.tipContent = (model, pass, grid, row, column) => {
  const cell = row * grid.pos.length + column;
  const position = grid.pos[column];
  const box = document.createDocumentFragment();
  const layer = grid.layers[row];
  const where = layer === 0 ? "embedding (row 0)" : "layer " + layer + " of " + model.n_layers;
  const after = model.strings[pass.tokens[position]];
  box.append(LS.element("div", "muted", where + (after === undefined ? "" : ", after " + after)));
  const list = LS.element("table");
  for (let i = cell * grid.k; i < (cell + 1) * grid.k; i += 1) {
    if (grid.t[i] < 0) continue;
    const line = LS.element("tr");
    line.append(LS.element("td", "", model.strings[grid.t[i]]), LS.element("td", "", LS.percent(grid.p[i])));
    list.append(line);
  }
  box.append(list);
  box.append(LS.element("div", "", "entropy " + LS.number(grid.h[cell]) + " bits"));
  box.append(LS.element("div", "", "KL to final " + LS.number(grid.d[cell]) + " bits"));
  box.append(LS.element("div", "", "rank of the model's own top-1: " + LS.number(grid.r[cell])));
  return box;
};

LS.showTip = (node, content) => {
  const tip = document.getElementById("tip");
  tip.replaceChildren(content);
  tip.hidden = false;
  const at = node.getBoundingClientRect();
  const size = tip.getBoundingClientRect();
  const left = Math.min(Math.max(8, at.left + at.width / 2 - size.width / 2), innerWidth - size.width - 8);
  const above = at.top - size.height - 8;
  tip.style.left = left + "px";
  tip.style.top = (above > 8 ? above : at.bottom + 8) + "px";
};

LS.hideTip = () => {
  document.getElementById("tip").hidden = true;
};
