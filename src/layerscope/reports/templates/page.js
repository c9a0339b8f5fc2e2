"use strict";
// A tip for whatever carries data-tip; its text is never read as HTML.
(() => {
  const tip = document.getElementById("tip");
  const show = (found, at) => {
    tip.hidden = !found;
    if (!found) return;
    tip.textContent = found.getAttribute("data-tip");
    const x = Math.min(at.x + 14, window.innerWidth - tip.offsetWidth - 8);
    const y = at.y + 18 + tip.offsetHeight > window.innerHeight ? at.y - tip.offsetHeight - 10 : at.y + 18;
    tip.style.left = `${Math.max(4, x)}px`;
    tip.style.top = `${Math.max(4, y)}px`;
  };
  const carrier = (target) => (target instanceof Element ? target.closest("[data-tip]") : null);
  document.addEventListener("pointermove", (event) => show(carrier(event.target), { x: event.clientX, y: event.clientY }));
  document.addEventListener("focusin", (event) => {
    const found = carrier(event.target);
    const box = found ? found.getBoundingClientRect() : null;
    show(found, box ? { x: box.left, y: box.bottom - 16 } : null);
  });
  document.addEventListener("focusout", () => show(null));
  // Tables sort by the head that is clicked; empty cells stay last.
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const numeric = head.classList.contains("n");
      const key = (row) => row.cells[column].dataset.key;
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === "" || y === "") return (x === "") - (y === "");
        const order = numeric ? Number(x) - Number(y) : x.localeCompare(y);
        return down ? -order : order;
      });
      table.tBodies[0].append(...rows);
    }));
  }
})();
