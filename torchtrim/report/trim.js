"use strict";
(() => {
  const all = (what, where = document) => [...where.querySelectorAll(what)];

  // Tables that can be sorted by a column: numbers by data-v, words as they are read; what has no value comes last.
  const sort = (table, place, up) => {
    const body = table.tBodies[0];
    const key = (row) => {
      const cell = row.cells[place];
      const text = "v" in cell.dataset ? cell.dataset.v : cell.textContent.trim();
      const number = text === "" || text === "nan" ? NaN : Number(text);
      return "v" in cell.dataset ? number : text;
    };
    const rows = [...body.rows].map((row) => [key(row), row]);
    rows.sort(([one], [two]) => {
      if (typeof one === "string") return up * one.localeCompare(two, undefined, { numeric: true });
      if (Number.isNaN(one) || Number.isNaN(two)) return Number.isNaN(one) - Number.isNaN(two);
      return up * (one - two);
    });
    body.append(...rows.map(([, row]) => row));
  };
  for (const table of all("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, place) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", up > 0 ? "ascending" : "descending");
        sort(table, place, up);
      });
    });
  }

  // A tip beside a mark, in place of the browser's own, and the same candidate lit in the chart and in the tables.
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  tip.setAttribute("aria-hidden", "true");
  document.body.append(tip);
  const show = (mark, text, event) => {
    tip.textContent = text;
    tip.hidden = false;
    const wide = document.documentElement.clientWidth;
    const left = Math.max(8, Math.min(event.clientX + 12, wide - tip.offsetWidth - 8));
    tip.style.left = `${left + window.scrollX}px`;
    tip.style.top = `${event.clientY + window.scrollY - tip.offsetHeight - 12}px`;
  };
  const light = (number, on) => {
    if (number !== undefined) all(`[data-number="${Number(number)}"]`).forEach((each) => each.classList.toggle("lit", on));
  };
  const tipped = (mark, text) => {
    mark.addEventListener("pointerenter", (event) => {
      show(mark, text, event);
      mark.classList.add("lit");
      light(mark.dataset.number, true);
    });
    mark.addEventListener("pointerleave", () => {
      tip.hidden = true;
      mark.classList.remove("lit");
      light(mark.dataset.number, false);
    });
  };
  for (const mark of all(".chart .dot, .chart polyline")) {
    const title = mark.querySelector("title");
    if (!title) continue;
    tipped(mark, title.textContent);
    title.remove();
  }
  for (const cell of all(".map .cell")) {
    tipped(cell, cell.title);
    cell.removeAttribute("title");
  }
  for (const row of all("tr[data-number]")) {
    row.addEventListener("pointerenter", () => light(row.dataset.number, true));
    row.addEventListener("pointerleave", () => light(row.dataset.number, false));
  }

  // A button that copies the command, where the browser allows it.
  const command = document.querySelector(".command");
  if (command && navigator.clipboard) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "copy";
    button.textContent = "Copy";
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(command.textContent);
        button.textContent = "Copied";
      } catch {
        button.textContent = "Select the text to copy it";
      }
    });
    command.after(button);
  }

  // On paper everything is unfolded.
  let folded = [];
  window.addEventListener("beforeprint", () => {
    folded = all("details:not([open])");
    folded.forEach((each) => { each.open = true; });
  });
  window.addEventListener("afterprint", () => folded.forEach((each) => { each.open = false; }));
})();
