// One explorer per model; a prompt's figures are built when it is chosen.
LS.Explorer = class {
  constructor(root, model) {
    this.root = root;
    this.model = model;
    this.lens = model.lenses.includes("norm") ? "norm" : model.lenses[0];
    this.colour = "probability";
    this.at = 0;
    this.drawn = false;
    this.select = root.querySelector("select[name=prompt]");
    this.fillSelect();
    const lensNames = Object.fromEntries(model.lenses.map((lens) => [lens, lens]));
    const colours = Object.fromEntries(Object.entries(LS.colourModes).map(([name, mode]) => [name, mode.label]));
    this.radios("lens", lensNames, this.lens, (value) => { this.lens = value; this.draw(); });
    this.radios("colour", colours, this.colour, (value) => { this.colour = value; this.drawGrid(); });
    this.multiples = LS.drawMultiples(this.slot("multiples"), model, (at) => {
      this.choose(at);
      root.querySelector(".controls").scrollIntoView();
    });
    this.select.addEventListener("change", () => this.choose(Number(this.select.value)));
    for (const button of root.querySelectorAll("[data-step]")) {
      button.addEventListener("click", () => this.choose(this.at + Number(button.dataset.step)));
    }
    for (const button of root.querySelectorAll("[data-prompt]")) {
      button.addEventListener("click", () => {
        const found = model.passes.findIndex((pass) => pass.index === Number(button.dataset.prompt));
        if (found < 0) return;
        this.choose(found);
        root.querySelector(".controls").scrollIntoView();
      });
    }
  }

  slot(name) { return this.root.querySelector('[data-slot="' + name + '"]'); }

  fillSelect() {
    const groups = { fact: "Prompts", ablation: "Without filler", control: "Controls" };
    for (const [kind, label] of Object.entries(groups)) {
      const group = LS.element("optgroup");
      group.label = label;
      this.model.passes.forEach((pass, i) => {
        if (pass.kind !== kind) return;
        const option = LS.element("option", "", pass.title);
        option.value = String(i);
        group.append(option);
      });
      if (group.children.length) this.select.append(group);
    }
  }

  radios(control, names, chosen, changed) {
    const options = LS.element("div", "options");
    for (const [value, label] of Object.entries(names)) {
      const holder = LS.element("label");
      const input = LS.element("input");
      input.type = "radio";
      input.name = control + "-" + this.root.dataset.model;
      input.value = value;
      input.checked = value === chosen;
      input.addEventListener("change", () => changed(value));
      holder.append(input, LS.element("span", "", label));
      options.append(holder);
    }
    this.root.querySelector('[data-control="' + control + '"]').append(options);
  }

  choose(at) {
    if (at < 0 || at >= this.model.passes.length) return;
    this.at = at;
    this.select.value = String(at);
    this.draw();
  }

  get pass() { return this.model.passes[this.at]; }

  draw() {
    this.drawn = true;
    this.select.value = String(this.at);
    LS.hideTip();
    this.drawText();
    this.drawGrid();
    this.drawFigures();
    this.drawLastRow();
    this.drawHead();
    for (const button of this.multiples) button.setAttribute("aria-pressed", String(Number(button.dataset.at) === this.at));
    for (const button of this.root.querySelectorAll("[data-prompt]")) {
      button.closest("tr").classList.toggle("current", Number(button.dataset.prompt) === this.pass.index);
    }
  }

  drawText() {
    const host = this.slot("text");
    host.replaceChildren();
    if (this.pass.text) host.append("“", LS.element("bdi", "", this.pass.text), "”");
    if (this.pass.answer) {
      host.append(this.pass.text ? " → " : "answer: ", LS.element("bdi", "answer", this.pass.answer));
    }
    if (this.pass.answer_note) host.append(LS.element("span", "aside", " (" + this.pass.answer_note + ")"));
  }

  drawGrid() {
    LS.drawGrid(this.slot("grid"), this.slot("grid-legend"), this.model, this.pass, this.lens, this.colour);
  }

  drawFigures() {
    LS.drawCurves(this.slot("curves"), this.slot("curves-absent"), this.model, this.pass, this.lens);
    LS.drawRaw(this.slot("raw"), this.model, this.pass);
  }

  drawLastRow() {
    const row = this.pass.last_rows.find((entry) => entry.lens === this.lens);
    const host = this.slot("last-row");
    if (!row || row.kl === null) {
      host.textContent = "Whether the last layer equals the model's own output was not recorded for the " + this.lens + " lens.";
      return;
    }
    const same = row.top1_agree === null ? "" : row.top1_agree ? ", the same top prediction" : ", a different top prediction";
    const better = row.kl_after_temp !== null && row.kl - row.kl_after_temp > 0.01
      ? " A temperature of " + LS.number(row.temp) + " would bring it to " + LS.number(row.kl_after_temp) + " bits."
      : "";
    host.textContent = "Last layer against the model's own output, " + this.lens + " lens: " + LS.number(row.kl) +
      " bits apart" + same + "." + better;
  }

  drawHead() {
    const host = this.slot("head");
    const head = this.pass.head;
    if (!head) {
      host.replaceChildren(LS.sentence(this.pass.absent.head));
      return;
    }
    const line = "Ten most likely next tokens; entropy " + LS.number(head.entropy) + " bits" +
      (head.answer_rank === null ? "." : "; the answer has rank " + LS.number(head.answer_rank) + " and probability " + LS.percent(head.p_answer) + ".");
    const table = LS.element("table", "bars");
    head.tokens.forEach((token, i) => {
      const row = LS.element("tr", i === head.answer_at ? "answer" : "");
      const bar = LS.element("td");
      const fill = LS.element("i");
      fill.style.width = 100 * head.probs[i] + "%";
      bar.append(fill);
      const name = LS.element("td", "", this.model.strings[token]);
      if (i === head.answer_at) name.append(LS.element("span", "tag", "the answer"));
      row.append(name, LS.element("td", "", LS.percent(head.probs[i])), bar);
      table.append(row);
    });
    host.replaceChildren(LS.element("p", "lead", line), table);
  }
};

LS.start = () => {
  LS.data = JSON.parse(document.getElementById("layers-data").textContent);
  const explorers = LS.data.models.map((model, i) => new LS.Explorer(document.getElementById("model-" + i), model));
  const shown = () => explorers.filter((explorer) => !explorer.root.hidden);
  const tabs = [...document.querySelectorAll(".models button")];
  for (const tab of tabs) {
    tab.addEventListener("click", () => {
      explorers.forEach((explorer, i) => { explorer.root.hidden = i !== Number(tab.dataset.model); });
      for (const other of tabs) other.setAttribute("aria-pressed", String(other === tab));
      for (const explorer of shown()) explorer.draw();
    });
  }
  let waiting = 0;
  const redraw = () => {
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(() => shown().forEach((explorer) => explorer.drawFigures()));
  };
  addEventListener("resize", redraw);
  addEventListener("scroll", LS.hideTip, { passive: true });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  for (const explorer of shown()) if (explorer.model.passes.length) explorer.draw();
};
LS.start();
