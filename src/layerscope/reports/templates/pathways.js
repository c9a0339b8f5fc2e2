(function () {
  "use strict";
  const data = JSON.parse(document.getElementById("pathway-graph").textContent);
  const root = document.getElementById("pathway-view");
  const svg = root.querySelector("svg");
  const controls = Object.fromEntries(
    [...root.querySelectorAll("[data-control]")].map((one) => [one.dataset.control, one]));
  const status = root.querySelector("[data-status]");
  const panel = root.querySelector("[data-panel]");
  const NS = "http://www.w3.org/2000/svg";
  const WIDTH = 1080, GAP = 84, TOP = 34;
  const nodes = new Map(data.nodes.map((node) => [node.id, node]));
  const layers = [...new Set(data.nodes.map((node) => node.layer))].sort((a, b) => a - b);
  const places = new Map();
  let chosen = null;

  const make = (name, attributes, parent) => {
    const one = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(attributes)) one.setAttribute(key, value);
    parent.append(one);
    return one;
  };
  const short = (value) => (value === null || value === undefined ? "none" : Number(value).toPrecision(3));

  for (const name of ["low", "high"]) {
    for (const layer of layers) controls[name].append(new Option("block " + layer, layer));
  }
  controls.low.value = layers[0];
  controls.high.value = layers[layers.length - 1];

  const sizes = data.edges.map((edge) => Math.abs(edge.weight)).sort((a, b) => b - a);
  controls.count.max = sizes.length;
  controls.count.value = Math.min(60, sizes.length);
  const most = sizes[0] || 1;

  function shown() {
    const low = Number(controls.low.value), high = Number(controls.high.value);
    const least = sizes[Math.max(0, Number(controls.count.value) - 1)] ?? Infinity;
    return data.edges.filter((edge) => {
      const from = nodes.get(edge.source), to = nodes.get(edge.target);
      return from.layer >= low && to.layer <= high && Math.abs(edge.weight) >= least
        && (controls.verdict.value === "all" || edge.verdict === controls.verdict.value)
        && (!controls.several.checked || edge.n_prompts > 1)
        && (chosen === null || !controls.only.checked || edge.source === chosen || edge.target === chosen);
    });
  }

  function arrange(ids) {
    const rows = layers.map((layer) => ids.filter((id) => nodes.get(id).layer === layer));
    const used = rows.filter((row) => row.length);
    used.forEach((row, at) => {
      row.forEach((id, index) => {
        if (!places.has(id)) {
          places.set(id, {
            x: (WIDTH * (index + 1)) / (row.length + 1),
            y: TOP + (used.length - 1 - at) * GAP,
            moved: false,
          });
        }
      });
    });
    return used.length;
  }

  function draw() {
    const edges = shown();
    const ids = [...new Set(edges.flatMap((edge) => [edge.source, edge.target]))].sort(
      (a, b) => nodes.get(a).feature_id - nodes.get(b).feature_id);
    const count = arrange(ids);
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${WIDTH} ${Math.max(1, count) * GAP + TOP}`);
    const lines = make("g", {}, svg), boxes = make("g", {}, svg);
    for (const edge of edges) {
      const a = places.get(edge.source), b = places.get(edge.target);
      const near = chosen === null || edge.source === chosen || edge.target === chosen;
      const line = make("line", {
        x1: a.x, y1: a.y - 11, x2: b.x, y2: b.y + 11,
        class: "edge " + (edge.weight > 0 ? "up" : "down") + (edge.verdict === "nonlinear" ? " bent" : ""),
        "stroke-width": 0.8 + 3.6 * Math.abs(edge.weight) / most,
        opacity: near ? 0.25 + 0.7 * Math.sqrt(Math.abs(edge.weight) / most) : 0.06,
      }, lines);
      line.addEventListener("pointerenter", () => tell([
        `${edge.source} → ${edge.target}: ${edge.verdict}`,
        `attribution ${short(edge.weight)}; replayed without the source: ${short(edge.actual)}`,
        `${edge.n_prompts} prompt${edge.n_prompts === 1 ? "" : "s"}, sign consistency ${short(edge.sign_consistency)}`,
        `source: ${words(edge.source)}`, `target: ${words(edge.target)}`,
      ]));
    }
    for (const id of ids) box(id, boxes);
    status.textContent = `${edges.length} of ${data.edges.length} edges, ${ids.length} of ${data.nodes.length} features`;
  }

  function words(id) {
    const tokens = nodes.get(id).tokens;
    return tokens.length ? tokens.map((token) => JSON.stringify(token)).join(" ") : "no token stands out";
  }

  function box(id, parent) {
    const node = nodes.get(id), place = places.get(id);
    const group = make("g", {
      class: "node" + (node.selected ? " causal" : "") + (id === chosen ? " chosen" : ""),
      transform: `translate(${place.x} ${place.y})`, tabindex: "0",
    }, parent);
    make("rect", { x: -36, y: -11, width: 72, height: 22, rx: 5 }, group);
    make("text", { y: 4, "text-anchor": "middle" }, group).textContent = id;
    const about = () => tell([
      id + (node.selected ? `: causal (${node.side}), d = ${short(node.cohen_d)}` : ": a driver, not tested itself"),
      `tokens: ${words(id)}`,
      `attribution in ${short(node.strength_in)}, out ${short(node.strength_out)}; influence ${short(node.influence)}`,
    ]);
    group.addEventListener("pointerenter", about);
    group.addEventListener("focus", about);
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
        if (!dragged) { chosen = chosen === id ? null : id; draw(); about(); }
      };
      window.addEventListener("pointermove", move);
      window.addEventListener("pointerup", stop);
    });
  }

  function tell(lines) {
    panel.replaceChildren(...lines.map((line) => {
      const one = document.createElement("div");
      one.textContent = line;
      return one;
    }));
  }

  for (const control of Object.values(controls)) {
    if (control.dataset.control === "reset") {
      control.addEventListener("click", () => { places.clear(); chosen = null; draw(); });
    } else {
      control.addEventListener("input", () => {
        if (["low", "high", "count"].includes(control.dataset.control)) places.clear();
        draw();
      });
    }
  }
  tell(["Point at a feature or an edge. Click a feature to follow its edges; drag it to move it."]);
  draw();
})();
