// One small figure per fact: the answer's rank over the layers, logarithmic, rank 1 on top.
LS.MULTIPLES = 60;
LS.dashes = { solid: "", dash: "5 3", dot: "1.5 2.5", dashdot: "5 2 1.5 2" };

// The parser knows the namespace of SVG, so that no address has to stand in the page.
LS.svgSpace = (() => {
  const template = document.createElement("template");
  template.innerHTML = "<svg></svg>";
  return template.content.firstChild.namespaceURI;
})();

LS.svg = (tag, attributes) => {
  const node = document.createElementNS(LS.svgSpace, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
};

LS.rankPath = (curves, model, worst) => {
  const x = (layer) => (100 * layer) / model.n_layers;
  const y = (rank) => 4 + (66 * Math.log10(rank)) / Math.max(Math.log10(worst), 1);
  let path = "";
  let pen = "M";
  curves.rank.forEach((rank, i) => {
    if (rank === null) { pen = "M"; return; }
    path += pen + x(curves.layer[i]).toFixed(1) + "," + y(rank).toFixed(1);
    pen = "L";
  });
  return path;
};

LS.drawMultiples = (host, model, choose) => {
  const facts = model.passes.map((pass, at) => ({ pass, at })).filter((entry) => entry.pass.kind === "fact");
  const ranked = facts.filter((entry) => Object.values(entry.pass.lenses).some((lens) => lens.curves.rank));
  if (!ranked.length) {
    host.replaceChildren(LS.sentence("No fact has an answer whose rank could be followed."));
    return [];
  }
  const buttons = ranked.slice(0, LS.MULTIPLES).map(({ pass, at }) => {
    const button = LS.element("button");
    button.type = "button";
    button.dataset.at = String(at);
    button.append(LS.element("span", "", pass.title));
    const drawn = LS.svg("svg", { viewBox: "0 0 100 74", preserveAspectRatio: "none", "aria-hidden": "true" });
    drawn.append(LS.svg("path", { class: "base", d: "M0,4H100" }));
    for (const [name, lens] of Object.entries(pass.lenses)) {
      if (!lens.curves.rank) continue;
      const style = LS.lensStyle(model, name);
      const line = LS.svg("path", { d: LS.rankPath(lens.curves, model, model.d_vocab), "stroke-dasharray": LS.dashes[style.dash] || "" });
      line.style.stroke = "var(" + style.colour + ")";
      drawn.append(line);
    }
    button.append(drawn);
    button.addEventListener("click", () => choose(at));
    return button;
  });
  const rest = ranked.length - buttons.length;
  host.replaceChildren(...buttons);
  if (rest > 0) host.append(LS.sentence(rest + " more facts are in the table below."));
  return buttons;
};
