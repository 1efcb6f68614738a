// Sorting, filtering, opening rows and highlighting runs. The page can be read without it. What is
// chosen lives in the address after #, so that a view can be linked: q, source, sort, open, theme.
"use strict";
(() => {
  const root = document.documentElement;
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const records = new Map(JSON.parse(document.getElementById("records").textContent).map((r) => [r.id, r]));
  const state = new URLSearchParams(location.hash.slice(1));
  root.classList.add("js");

  function keep(name, value) {
    if (value) state.set(name, value);
    else state.delete(name);
    history.replaceState(null, "", "#" + state);
  }

  // Filter: every word must begin a word of a row; runs without a visible row leave the charts too.
  const words = new Map();
  for (const row of all("[data-words]")) words.set(row.dataset.run, row.dataset.words.toLowerCase().split(/[^\p{L}\p{N}._]+/u));
  function filter() {
    const wanted = (state.get("q") || "").toLowerCase().split(/\s+/).filter(Boolean);
    const source = state.get("source") || "";
    const shown = new Set();
    for (const [run, has] of words) if (wanted.every((word) => has.some((one) => one.startsWith(word)))) shown.add(run);
    for (const part of all("[data-run]")) part.classList.toggle("off", !shown.has(part.dataset.run));
    for (const block of all("[data-block]")) block.classList.toggle("off", !block.querySelector("[data-run]:not(.off)"));
    for (const part of all("[data-section]")) part.hidden = Boolean(source) && part.dataset.section !== source;
    for (const button of all("[data-source]")) button.setAttribute("aria-pressed", String(button.dataset.source === source));
    document.getElementById("shown").textContent = wanted.length ? `${shown.size} of ${words.size} rows` : "";
  }
  const input = document.getElementById("filter");
  input.value = state.get("q") || "";
  input.addEventListener("input", () => { keep("q", input.value.trim()); filter(); });
  for (const button of all("[data-source]"))
    button.addEventListener("click", () => { keep("source", button.dataset.source); filter(); });

  // Sort: numbers fall first, names rise first, a third click restores the records' order; gaps stay last.
  const order = new Map(all("table.board").map((table) => [table, all("tbody.row", table)]));
  function sort(table, column, direction) {
    const value = (body) => body.rows[0].cells[column].dataset.sort;
    const rows = [...order.get(table)];
    const numeric = column > 0;
    if (direction)
      rows.sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === "" || y === "") return (x === "") - (y === "");
        const by = numeric ? Number(x) - Number(y) : x.localeCompare(y);
        return direction === "ascending" ? by : -by;
      });
    table.append(...rows);
    for (const button of all(".sort", table)) {
      const head = button.closest("th");
      if (direction && Number(button.dataset.column) === column) head.setAttribute("aria-sort", direction);
      else head.removeAttribute("aria-sort");
    }
  }
  for (const table of order.keys())
    for (const button of all(".sort", table))
      button.addEventListener("click", () => {
        const column = Number(button.dataset.column);
        const cycle = column > 0 ? ["descending", "ascending", ""] : ["ascending", "descending", ""];
        const now = button.closest("th").getAttribute("aria-sort") || "";
        const next = cycle[(cycle.indexOf(now) + 1) % 3];
        sort(table, column, next);
        if (table.id) keep("sort", next && `${column} ${next}`);
      });
  const [column, direction] = (state.get("sort") || "").split(" ");
  const overview = document.getElementById("overview");
  if (overview && ["ascending", "descending"].includes(direction) && all(`.sort[data-column="${Number(column)}"]`, overview).length)
    sort(overview, Number(column), direction);

  // Open a row.
  function open(button, wide) {
    button.setAttribute("aria-expanded", String(wide));
    document.getElementById(button.getAttribute("aria-controls")).classList.toggle("shown", wide);
  }
  for (const button of all(".open"))
    button.addEventListener("click", () => {
      const wide = button.getAttribute("aria-expanded") !== "true";
      open(button, wide);
      keep("open", wide ? button.getAttribute("aria-controls").slice(2) : "");
    });
  const wanted = document.getElementById("r-" + (state.get("open") || ""));
  if (wanted) {
    open(wanted.querySelector(".open"), true);
    wanted.scrollIntoView({ block: "center" });
  }
  for (const raw of all("[data-raw]"))
    raw.addEventListener("toggle", () => {
      raw.querySelector("pre").textContent = JSON.stringify(records.get(raw.dataset.raw), null, 2);
    });

  // Point at a run anywhere and it stands out everywhere; click a name in a legend to keep it so.
  let kept = "";
  function point(run) {
    for (const part of all(".hot")) part.classList.remove("hot");
    if (run) for (const part of all("[data-run]")) part.classList.toggle("hot", part.dataset.run === run);
    for (const chart of all(".chart")) chart.classList.toggle("focus", Boolean(chart.querySelector(".hot")));
  }
  for (const part of all(".source-measured [data-run]")) {
    part.addEventListener("pointerenter", () => point(part.dataset.run));
    part.addEventListener("pointerleave", () => point(kept));
    part.addEventListener("focusin", () => point(part.dataset.run));
    part.addEventListener("focusout", () => point(kept));
  }
  for (const button of all(".pick"))
    button.addEventListener("click", () => {
      const run = button.closest("[data-run]").dataset.run;
      kept = kept === run ? "" : run;
      for (const other of all(".pick")) other.setAttribute("aria-pressed", String(other.closest("[data-run]").dataset.run === kept));
      point(kept || run);
    });

  // One context length at a time, where tasks have several.
  function atLength(section, length) {
    const table = section.querySelector("table.board");
    const heads = all("thead tr:last-child th", table);
    const hidden = heads.map((head) => Boolean(length) && head.dataset.length !== length);
    heads.forEach((head, i) => head.classList.toggle("off", hidden[i]));
    for (const row of all("tbody.row > tr:first-child", table))
      hidden.forEach((is, i) => row.cells[i + 1].classList.toggle("off", is));
    let at = 0;
    for (const span of all(".span", table)) {
      span.dataset.width ||= span.getAttribute("colspan");
      const width = Number(span.dataset.width);
      const left = hidden.slice(at, at + width).filter((is) => !is).length;
      span.classList.toggle("off", left === 0);
      span.setAttribute("colspan", String(left || 1));
      at += width;
    }
    for (const button of all("[data-show]", section)) button.setAttribute("aria-pressed", String(button.dataset.show === length));
  }
  for (const section of all(".group")) {
    const buttons = all("[data-show]", section);
    for (const button of buttons) button.addEventListener("click", () => atLength(section, button.dataset.show));
    if (buttons.length) atLength(section, buttons[buttons.length - 2].dataset.show);
  }

  // Theme: as the system has it, unless the reader says otherwise.
  const themes = ["auto", "light", "dark"];
  const button = document.getElementById("theme");
  function dress() {
    const theme = themes.includes(state.get("theme")) ? state.get("theme") : "auto";
    if (theme === "auto") delete root.dataset.theme;
    else root.dataset.theme = theme;
    button.textContent = "Theme: " + theme;
    return theme;
  }
  button.addEventListener("click", () => {
    const next = themes[(themes.indexOf(dress()) + 1) % 3];
    keep("theme", next === "auto" ? "" : next);
    dress();
  });

  dress();
  filter();
})();
