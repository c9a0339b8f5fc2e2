(function () {
  "use strict";
  const data = JSON.parse(document.getElementById("attribution-graph").textContent);
  const root = document.getElementById("graph-view");
  const svg = root.querySelector("svg");
  const controls = Object.fromEntries(
    [...root.querySelectorAll("[data-control]")].map((one) => [one.dataset.control, one]));
  const status = root.querySelector("[data-status]");
  const panel = root.querySelector("[data-panel]");
  const NS = "http://www.w3.org/2000/svg";
  const WIDTH = 1120, LEFT = 74, GAP = 58, TOP = 40, FOOT = 78;
  const nodes = new Map(data.nodes.map((node) => [node.node, node]));
  const layers = [...new Set(data.nodes.map((node) => node.layer))].sort((a, b) => a - b);
  const top = layers[layers.length - 1];
  const places = new Map();
  let chosen = null;

  const make = (name, attributes, parent) => {
    const one = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(attributes)) one.setAttribute(key, value);
    parent.append(one);
    return one;
  };
  const short = (value) => (value === null || value === undefined ? "not measured" : Number(value).toPrecision(3));
  const rowName = (layer) => (layer < 0 ? "embedding" : layer === top ? "next token" : "block " + layer);

  for (const name of ["low", "high"]) {
    for (const layer of layers) controls[name].append(new Option(rowName(layer), layer));
  }
  controls.low.value = layers[0];
  controls.high.value = top;
  // What an edge carries of its target's influence decides which are the strongest.
  const sizes = data.edges.map((edge) => edge.flow).sort((a, b) => b - a);
  controls.count.max = sizes.length;
  controls.count.value = Math.min(150, sizes.length);
  const most = sizes[0] || 1;

  const visible = (node) => node.layer >= Number(controls.low.value) && node.layer <= Number(controls.high.value)
    && (controls.errors.checked || (node.kind !== "error" && node.kind !== "mlp"));

  function shown() {
    const least = sizes[Math.max(0, Number(controls.count.value) - 1)] ?? Infinity;
    const weight = Number(controls.weight.value);
    return data.edges.filter((edge) => {
      const from = nodes.get(edge.source), to = nodes.get(edge.target);
      const own = edge.source === chosen || edge.target === chosen; // all edges of the clicked node are drawn
      return visible(from) && visible(to) && (own || edge.flow >= least) && Math.abs(edge.weight) >= weight
        && (chosen === null || !controls.only.checked || own);
    });
  }

  // A column for every token, as wide as its fullest cell asks; columns without a node are narrow.
  function arrange(ids) {
    const cells = new Map();
    for (const id of ids) {
      const node = nodes.get(id), key = node.layer + ":" + node.position;
      cells.set(key, [...(cells.get(key) || []), id]);
    }
    const widths = data.tokens.map(() => 0.6);
    for (const [key, held] of cells) {
      const at = Number(key.split(":")[1]);
      widths[at] = Math.max(widths[at], 0.8 + held.length);
    }
    const scale = (WIDTH - LEFT) / widths.reduce((sum, width) => sum + width, 0);
    const starts = [];
    widths.reduce((sum, width, at) => ((starts[at] = sum), sum + width * scale), LEFT);
    for (const [key, held] of cells) {
      const [layer, at] = key.split(":").map(Number);
      held.sort((a, b) => nodes.get(b).influence - nodes.get(a).influence);
      held.forEach((id, index) => {
        if (places.has(id)) return;
        places.set(id, {
          x: starts[at] + (widths[at] * scale * (index + 1)) / (held.length + 1),
          y: TOP + (layers.length - 1 - layers.indexOf(layer)) * GAP + (index % 2 && held.length > 6 ? 9 : 0),
        });
      });
    }
    return { starts, widths: widths.map((width) => width * scale) };
  }

  let columns = null;
  function draw() {
    const edges = shown();
    const ids = [...new Set(edges.flatMap((edge) => [edge.source, edge.target]))];
    if (chosen !== null && !ids.includes(chosen)) ids.push(chosen);
    if (columns === null) columns = arrange(data.nodes.filter(visible).map((node) => node.node));
    svg.replaceChildren();
    const bottom = TOP + (layers.length - 1) * GAP;
    svg.setAttribute("viewBox", `0 0 ${WIDTH} ${bottom + FOOT}`);
    layers.forEach((layer, index) => {
      const y = TOP + (layers.length - 1 - index) * GAP;
      make("line", { x1: LEFT, x2: WIDTH, y1: y, y2: y, class: "rule" }, svg);
      make("text", { x: 0, y: y + 4 }, svg).textContent = rowName(layer);
    });
    data.tokens.forEach((token, at) => {
      const x = columns.starts[at] + columns.widths[at] / 2;
      if (at) make("line", { x1: columns.starts[at], x2: columns.starts[at], y1: TOP - 20, y2: bottom + 14, class: "rule" }, svg);
      const label = make("text", { x, y: bottom + 26, class: "token", transform: `rotate(38 ${x} ${bottom + 26})` }, svg);
      label.textContent = token.length > 9 ? token.slice(0, 8) + "…" : token;
    });
    const lines = make("g", {}, svg), marks = make("g", {}, svg);
    const near = new Set(chosen === null ? ids : [chosen]);
    for (const edge of edges) {
      const a = places.get(edge.source), b = places.get(edge.target);
      const lit = chosen === null || edge.source === chosen || edge.target === chosen;
      if (lit) { near.add(edge.source); near.add(edge.target); }
      const half = (a.y + b.y) / 2;
      const line = make("path", {
        d: `M${a.x} ${a.y}C${a.x} ${half} ${b.x} ${half} ${b.x} ${b.y}`,
        class: "edge " + (edge.weight > 0 ? "up" : "down"),
        "stroke-width": 0.7 + 4 * Math.sqrt(edge.flow / most),
        opacity: lit ? (chosen === null ? 0.22 : 0.4) + 0.55 * Math.sqrt(edge.flow / most) : 0.04,
      }, lines);
      line.addEventListener("pointerenter", () => tell(about(edge)));
    }
    for (const id of ids) mark(id, marks, near.has(id));
    status.textContent = `${edges.length} of ${data.edges.length} edges, ${ids.length} of ${data.nodes.length} nodes`;
  }

  const title = (node) => ({
    feature: `feature ${node.layer}/${node.feature_id} at ${node.position} ${JSON.stringify(node.token)}`,
    error: `what dictionary ${node.layer} leaves at ${node.position} ${JSON.stringify(node.token)}`,
    mlp: `what MLP ${node.layer} writes beyond its tangent at ${node.position} ${JSON.stringify(node.token)}`,
    token: `token ${node.position} ${JSON.stringify(node.token)}`,
    logit: `next token ${JSON.stringify(node.token)}`,
  }[node.kind]);

  function about(edge) {
    const lines = [
      `${title(nodes.get(edge.source))} → ${title(nodes.get(edge.target))}`,
      `attribution ${short(edge.weight)}, ${(100 * edge.share).toFixed(1)}% of what the target gets`,
    ];
    if (edge.measured !== undefined) {
      lines.push(`the source taken away: predicted ${short(-edge.weight)}, measured ${short(edge.measured)}, a random direction ${short(edge.random)}`);
    }
    return lines;
  }

  function describe(id) {
    const node = nodes.get(id);
    const lines = [title(node)];
    if (node.kind === "logit") lines.push(`probability ${short(node.activation)}`);
    if (node.kind === "feature") lines.push(`activation ${short(node.activation)}; raises ${node.promotes}`);
    if (node.kind !== "logit") {
      let line = `influence ${short(node.influence)}`;
      if (node.effect !== null) line += `; the first logit owes it ${short(node.effect)}`;
      if (node.measured !== undefined) line += `, taken away it changes by ${short(node.measured)}`;
      lines.push(line);
    }
    const list = (key, other, word) => {
      const found = data.edges.filter((edge) => edge[key] === id)
        .sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight)).slice(0, 4);
      if (found.length) lines.push(`${word}: ` + found.map((edge) => `${title(nodes.get(edge[other]))} (${short(edge.weight)})`).join(" · "));
    };
    list("target", "source", "from");
    list("source", "target", "to");
    return lines;
  }

  function mark(id, parent, lit) {
    const node = nodes.get(id), place = places.get(id);
    const group = make("g", {
      class: `node ${node.kind}` + (id === chosen ? " chosen" : ""), tabindex: "0",
      transform: `translate(${place.x} ${place.y})`, opacity: lit ? 1 : 0.25,
    }, parent);
    const size = 4 + 5 * Math.sqrt(Math.min(1, node.influence));
    if (node.kind === "feature") make("circle", { r: size }, group);
    else if (node.kind === "error" || node.kind === "mlp") make("path", { d: `M0 ${-size}L${size} 0L0 ${size}L${-size} 0Z` }, group);
    else make("rect", { x: -size, y: -size, width: 2 * size, height: 2 * size, rx: 1.5 }, group);
    if (node.kind === "logit") {
      make("text", { y: -15, "text-anchor": place.x > WIDTH - 90 ? "end" : "middle" }, group)
        .textContent = `${node.token} ${(100 * node.activation).toFixed(0)}%`;
    }
    const say = () => tell(describe(id));
    group.addEventListener("pointerenter", () => { if (chosen === null) say(); });
    group.addEventListener("focus", say);
    group.addEventListener("keydown", (event) => { if (event.key === "Enter") choose(id); });
    group.addEventListener("pointerdown", (event) => {
      event.preventDefault();
      const scale = svg.viewBox.baseVal.width / svg.getBoundingClientRect().width;
      const start = { x: event.clientX, y: event.clientY, px: place.x, py: place.y };
      let dragged = false;
      const move = (to) => {
        dragged = dragged || Math.hypot(to.clientX - start.x, to.clientY - start.y) > 4;
        place.x = start.px + (to.clientX - start.x) * scale;
        place.y = start.py + (to.clientY - start.y) * scale;
        if (dragged) draw();
      };
      const stop = () => {
        window.removeEventListener("pointermove", move);
        window.removeEventListener("pointerup", stop);
        if (!dragged) choose(id);
      };
      window.addEventListener("pointermove", move);
      window.addEventListener("pointerup", stop);
    });
  }

  function choose(id) {
    chosen = chosen === id ? null : id;
    draw();
    tell(describe(id));
  }

  function tell(lines) {
    panel.replaceChildren(...lines.map((line) => {
      const one = document.createElement("div");
      one.textContent = line;
      return one;
    }));
  }

  function again() { places.clear(); columns = null; draw(); }
  for (const [name, control] of Object.entries(controls)) {
    if (name === "reset") control.addEventListener("click", () => { chosen = null; again(); });
    else control.addEventListener("input", ["low", "high", "errors"].includes(name) ? again : draw);
  }
  tell(["Point at a node or an edge. Click a node to follow its edges, click again to let go; drag it to move it."]);
  draw();
})();
