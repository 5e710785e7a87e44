"use strict";
(() => {
  const root = document.documentElement;
  const data = JSON.parse(document.getElementById("data").textContent);
  const tip = document.getElementById("tip");
  const live = document.getElementById("live");
  const dialog = document.getElementById("head");
  const SVG = "http://www.w3.org/2000/svg";
  root.classList.add("js");

  // Elements are made with text, never from markup: names of models may hold anything.
  function set(element, attributes) {
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  }
  function make(tag, attributes = {}, ...children) {
    const element = set(document.createElement(tag), attributes);
    element.append(...children);
    return element;
  }
  const draw = (tag, attributes) => set(document.createElementNS(SVG, tag), attributes);
  const titles = (names) => make("tr", {}, ...names.map((name) => make("th", { scope: "col" }, name)));
  // a table that scrolls in itself where the window is narrow
  function scrolling(label, caption, names, body, attributes = {}) {
    const table = make("table", attributes, make("caption", {}, make("span", {}, caption)), make("thead", {}, titles(names)), body);
    return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label }, table);
  }
  function text(value) {
    if (value === null || value === undefined) return "–";
    const shown = Math.abs(value) < 100 ? value.toFixed(3) : value.toFixed(1);
    return (shown === "-0.000" ? "0.000" : shown).replace("-", "−");
  }
  const interval = (low, high) => (low === null || low === undefined || high === null ? "" : `${text(low)} to ${text(high)}`);
  const measured = (found) => make("td", {}, text(found.mean), make("small", {}, interval(found.low, found.high)));
  const closest = (places, x) => places.reduce((best, at, i) => (Math.abs(at - x) < Math.abs(places[best] - x) ? i : best), 0);
  function step(key, count, place) {
    const moves = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: 5, PageDown: -5 };
    if (key === "Home") return 0;
    if (key === "End") return count - 1;
    if (!(key in moves)) return null;
    return Math.max(0, Math.min(count - 1, place + moves[key]));
  }

  /* ---- tooltip ---- */
  let again = null;  // shows it at its new place after scrolling, where it belongs to what has the focus
  function show(content, x, y, repeat = null) {
    again = repeat;
    const host = dialog.open ? dialog : document.body;
    if (tip.parentNode !== host) host.append(tip);
    tip.replaceChildren(...content);
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const width = root.clientWidth, height = window.innerHeight;
    let left = x + 16, top = y + 16;
    if (left + box.width > width - 8) left = x - 16 - box.width;
    if (top + box.height > height - 8) top = y - 16 - box.height;
    tip.style.left = `${Math.max(8, Math.min(left, width - 8 - box.width))}px`;
    tip.style.top = `${Math.max(8, top)}px`;
  }
  const hide = () => { tip.hidden = true; again = null; };
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  // reaching something by key scrolls to it: its tooltip goes along; one under the pointer no longer fits
  document.addEventListener("scroll", () => { if (again) again(); else hide(); }, { passive: true, capture: true });

  for (const element of document.querySelectorAll("[data-tip]")) {
    const tell = (repeat = null) => {
      const box = element.getBoundingClientRect();
      show([element.dataset.tip], box.left - 8, box.bottom - 10, repeat);
    };
    const stay = () => tell(stay);
    element.addEventListener("mouseenter", () => tell());
    element.addEventListener("mouseleave", hide);
    element.addEventListener("focus", () => { if (element.matches(":focus-visible")) stay(); });
    element.addEventListener("blur", hide);
  }

  /* ---- curves ---- */
  for (const plot of document.querySelectorAll("[data-chart]")) {
    const chart = data.charts[plot.dataset.chart];
    const svg = plot.querySelector("svg");
    const cursor = svg.querySelector(".cursor");
    const stops = [...new Set(chart.curves.flatMap((curve) => curve.x))].sort((a, b) => a - b);
    let place = -1;

    function readings(x) {
      const found = [];
      for (const curve of chart.curves) {
        const best = closest(curve.x, x);
        if (chart.exact && Math.abs(curve.x[best] - x) > 0.2) continue;
        found.push({ curve, layer: curve.layer[best], mean: curve.mean[best], low: curve.low[best], high: curve.high[best] });
      }
      return found;
    }
    function read(index, speak, keys) {
      place = index;
      const x = stops[index];
      const found = readings(x);
      cursor.setAttribute("d", `M${x} 8V198`);
      cursor.removeAttribute("hidden");
      const title = chart.exact ? `layer ${found[0].layer}` : `relative depth ${((x - stops[0]) / (stops.at(-1) - stops[0] || 1)).toFixed(2)}`;
      const rows = found.map((one) => {
        const dot = draw("svg", { width: 10, height: 10, viewBox: "0 0 10 10" });
        dot.append(draw("circle", { cx: 5, cy: 5, r: 4, style: `fill:var(--${one.curve.colour})` }));
        const name = chart.exact ? one.curve.label : `${one.curve.label}, layer ${one.layer}`;
        return make("tr", {}, make("td", {}, dot, " ", name), make("td", {}, text(one.mean)), make("td", {}, make("small", {}, interval(one.low, one.high))));
      });
      const matrix = svg.getScreenCTM();
      const box = plot.getBoundingClientRect();
      show([make("strong", {}, title), make("table", {}, make("tbody", {}, ...rows))], x * matrix.a + matrix.e, box.top + box.height / 3, keys ? () => read(index, false, true) : null);
      if (speak) live.textContent = `${title}. ` + found.map((one) => `${one.curve.label} ${text(one.mean)}`).join("; ");
    }
    function leave() { place = -1; cursor.setAttribute("hidden", ""); hide(); }
    function nearest(event) {
      const matrix = svg.getScreenCTM();
      return closest(stops, (event.clientX - matrix.e) / matrix.a);
    }
    plot.addEventListener("pointermove", (event) => read(nearest(event), false));
    plot.addEventListener("pointerdown", (event) => read(nearest(event), false));
    plot.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") leave(); });
    plot.addEventListener("blur", leave);
    plot.addEventListener("focus", () => { if (plot.matches(":focus-visible")) read(0, false, true); });
    plot.addEventListener("keydown", (event) => {
      if (event.key === "Escape") { leave(); return; }
      const next = step(event.key, stops.length, place);
      if (next === null) return;
      event.preventDefault();
      read(next, true, true);
    });
  }

  /* ---- tables that sort ---- */
  for (const table of document.querySelectorAll("table.sortable")) {
    const headings = [...table.tHead.rows[0].cells];
    const body = table.tBodies[0];
    headings.forEach((heading, column) => {
      heading.querySelector("button").addEventListener("click", () => {
        const now = heading.getAttribute("aria-sort");
        const order = column === 0 ? (now === "ascending" ? "descending" : "ascending") : now === "descending" ? "ascending" : "descending";
        const sign = order === "ascending" ? 1 : -1;
        const value = (row) => (row.cells[column].dataset.value === undefined ? null : Number(row.cells[column].dataset.value));
        const rows = [...body.rows].sort((a, b) => {
          const [x, y] = [value(a), value(b)];
          if (x === null || y === null) return (x === null) - (y === null);  // gaps stay last
          return sign * (x - y);
        });
        body.append(...rows);
        headings.forEach((other) => other.setAttribute("aria-sort", other === heading ? order : "none"));
        live.textContent = `sorted by ${heading.textContent}, ${order}`;
      });
    });
  }

  /* ---- heads ---- */
  function numbers(line, metric, index) {
    const packed = data.heads[line].metrics[metric];
    const at = (values) => { const value = values ? values[index] : null; return value === null ? null : value / packed.scale; };
    return { mean: at(packed.mean), low: at(packed.low), high: at(packed.high) };
  }
  const address = (line, layer, head) => `#head=${line}/${layer}/${head}`;
  const places = new Map();  // where each map's marker stands

  for (const map of document.querySelectorAll(".map")) {
    const { line, metric } = map.dataset;
    const heads = data.heads[line];
    const first = Number(map.dataset.first), layers = Number(map.dataset.layers), count = Number(map.dataset.heads);
    const [wide, high] = map.dataset.cell.split(" ").map(Number);
    const svg = map.querySelector("svg");
    const frame = svg.querySelector(".cell");
    places.set(map, [0, 0]);

    function mark(row, head, speak, event) {
      places.set(map, [row, head]);
      set(frame, { x: 34 + head * wide, y: 4 + row * high, width: wide, height: high });
      frame.removeAttribute("hidden");
      const at = heads.layers.indexOf(first + row);
      const found = at < 0 ? { mean: null } : numbers(line, metric, at * heads.heads + head);
      const title = `layer ${first + row}, head ${head}`;
      const matrix = svg.getScreenCTM();
      const x = event ? event.clientX : (34 + (head + 0.5) * wide) * matrix.a + matrix.e;
      const y = event ? event.clientY : (4 + (row + 0.5) * high) * matrix.d + matrix.f;
      show([make("strong", {}, title), found.mean === null ? "no such head, or not measured" : `${text(found.mean)} `, make("small", {}, interval(found.low, found.high))], x, y, event ? null : () => mark(row, head, false));
      if (speak) live.textContent = `${title}: ${text(found.mean)}`;
    }
    function under(event) {
      const matrix = svg.getScreenCTM();
      const head = Math.floor(((event.clientX - matrix.e) / matrix.a - 34) / wide);
      const row = Math.floor(((event.clientY - matrix.f) / matrix.d - 4) / high);
      return head >= 0 && head < count && row >= 0 && row < layers ? [row, head] : null;
    }
    function leave() { frame.setAttribute("hidden", ""); hide(); }
    map.addEventListener("pointermove", (event) => { const at = under(event); if (at) mark(...at, false, event); else leave(); });
    map.addEventListener("pointerleave", leave);
    map.addEventListener("blur", leave);
    map.addEventListener("focus", () => { if (map.matches(":focus-visible")) mark(...places.get(map), true); });
    map.addEventListener("click", (event) => { const at = under(event); if (at && heads.layers.includes(first + at[0])) location.hash = address(line, first + at[0], at[1]); });
    map.addEventListener("keydown", (event) => {
      let [row, head] = places.get(map);
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        if (heads.layers.includes(first + row)) location.hash = address(line, first + row, head);
        return;
      }
      if (event.key === "Escape") { leave(); return; }
      const moves = { ArrowDown: [1, 0], ArrowUp: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1] };
      if (event.key === "Home") head = 0;
      else if (event.key === "End") head = count - 1;
      else if (event.key === "PageUp") row = 0;
      else if (event.key === "PageDown") row = layers - 1;
      else if (event.key in moves) { row += moves[event.key][0]; head += moves[event.key][1]; }
      else return;
      event.preventDefault();
      mark(Math.max(0, Math.min(layers - 1, row)), Math.max(0, Math.min(count - 1, head)), true);
    });
  }
  for (const form of document.querySelectorAll(".choose")) {
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      location.hash = address(form.dataset.line, form.elements.layer.value, form.elements.head.value);
    });
  }
  for (const details of document.querySelectorAll("details.long")) {
    // up to thousands of cells: made when they are asked for
    details.addEventListener("toggle", () => {
      if (!details.open || details.querySelector("table")) return;
      const { line, metric } = details.dataset;
      const heads = data.heads[line];
      const every = [...Array(heads.heads).keys()];
      const body = make("tbody", {}, ...heads.layers.map((layer, i) => make("tr", {}, make("th", { scope: "row" }, String(layer)),
        ...every.map((head) => make("td", {}, text(numbers(line, metric, i * heads.heads + head).mean))))));
      const caption = `${data.metrics[metric].heading} by layer and head, ${heads.label}`;
      details.append(scrolling(caption, caption, ["layer", ...every.map((head) => `head ${head}`)], body));
    });
  }

  function spark(values, means, at, name) {
    const known = [...values, ...means, 0].filter((value) => value !== null);
    const low = Math.min(...known), high = Math.max(...known);
    const x = (i) => (values.length > 1 ? 3 + (i / (values.length - 1)) * 146 : 76);
    const y = (value) => 35 - ((value - low) / (high - low || 1)) * 31;
    const path = (list) => {
      let pen = "M";
      return list.map((value, i) => {
        if (value === null) { pen = "M"; return ""; }
        const part = `${pen}${x(i).toFixed(1)} ${y(value).toFixed(1)}`;
        pen = "L";
        return part;
      }).join("");
    };
    const svg = draw("svg", { class: "spark", viewBox: "0 0 152 38", role: "img", "aria-label": name });
    svg.append(draw("path", { class: "zero", d: `M3 ${y(0).toFixed(1)}H149` }), draw("path", { class: "mean", d: path(means) }), draw("path", { d: path(values) }));
    if (values[at] !== null) svg.append(draw("circle", { cx: x(at), cy: y(values[at]), r: 3.4 }));
    return svg;
  }

  let returnTo = null;
  function open(line, layer, head) {
    const heads = data.heads[line];
    const at = heads.layers.indexOf(layer);
    const title = make("h2", { id: "head-h", tabindex: "-1" }, `Layer ${layer}, head ${head}`);
    const steps = make("div", { class: "steps" });
    const go = (label, name, to, possible) => {
      const button = make("button", { type: "button", "aria-label": name }, label);
      button.disabled = !possible;
      button.addEventListener("click", () => location.replace(to()));
      steps.append(button);
    };
    go("← head", "previous head", () => address(line, layer, head - 1), head > 0);
    go("head →", "next head", () => address(line, layer, head + 1), head < heads.heads - 1);
    go("↑ layer", "previous layer", () => address(line, heads.layers[at - 1], head), at > 0);
    go("layer ↓", "next layer", () => address(line, heads.layers[at + 1], head), at < heads.layers.length - 1);
    const close = make("button", { type: "button", "data-close": "" }, "Close");
    close.addEventListener("click", () => dialog.close());
    steps.append(close);

    const body = make("div", { class: "dialog-body" });
    body.append(
      make("p", { class: "prose" }, `${heads.label}. The line follows head ${head} over the layers, the dashed one is the mean over heads, and the dot is this layer. Heads of different layers that share a number have nothing else in common.`),
    );
    for (const [group, metrics] of Object.entries(heads.groups)) {
      const rows = make("tbody");
      for (const metric of metrics) {
        const packed = heads.metrics[metric];
        const here = numbers(line, metric, at * heads.heads + head);
        const over = heads.layers.map((_, i) => numbers(line, metric, i * heads.heads + head).mean);
        const means = packed.layer.map((value) => (value === null ? null : value / packed.scale));
        const { heading } = data.metrics[metric];
        rows.append(make("tr", {},
          make("th", { scope: "row" }, heading),
          measured(here),
          make("td", {}, text(means[at])),
          make("td", {}, spark(over, means, at, `${heading} of head ${head}, from ${text(over[0])} in layer ${heads.layers[0]} to ${text(over.at(-1))} in layer ${heads.layers.at(-1)}`)),
        ));
      }
      body.append(scrolling(group, group, ["metric", "this head", "mean over heads", "over layers"], rows, { class: "head-table" }));
    }
    const all = make("details", {}, make("summary", {}, `Head ${head} in every layer, as a table`));
    const names = Object.values(heads.groups).flat();
    const layers = make("tbody", {}, ...heads.layers.map((number, i) => make("tr", {}, make("th", { scope: "row" }, String(number)),
      ...names.map((name) => measured(numbers(line, name, i * heads.heads + head))))));
    all.append(scrolling("all layers", `Head ${head} of ${heads.label} in every layer`, ["layer", ...names.map((name) => data.metrics[name].heading)], layers));
    body.append(all);

    dialog.replaceChildren(make("div", { class: "dialog-top" }, title, steps), body);
    if (!dialog.open) { returnTo = document.activeElement; dialog.showModal(); }
    hide();
    dialog.scrollTop = 0;
    title.focus();
    live.textContent = "";
  }
  dialog.addEventListener("close", () => {
    document.body.append(tip);
    hide();
    // the address without the head, at the same place in the page
    if (location.hash.startsWith("#head=")) history.replaceState(null, "", location.pathname + location.search);
    if (returnTo && returnTo.isConnected) returnTo.focus({ preventScroll: true });
  });
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  // what is linked to may be folded; not every browser unfolds it
  function unfold() {
    const target = document.getElementById(location.hash.slice(1));
    if (!target) return;
    for (let at = target; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
    target.scrollIntoView();
  }
  function follow() {
    const found = /^#head=(.+)\/(\d+)\/(\d+)$/.exec(location.hash);
    if (!found) { if (dialog.open) dialog.close(); unfold(); return; }
    const line = decodeURIComponent(found[1]), layer = Number(found[2]), head = Number(found[3]);
    const heads = data.heads[line];
    if (heads && heads.layers.includes(layer) && head < heads.heads) open(line, layer, head);
  }
  window.addEventListener("hashchange", follow);
  follow();

  /* ---- print: what is folded is opened, and folded again ---- */
  let opened = [];
  window.addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open]):not(.long)")];
    opened.forEach((details) => { details.open = true; });
  });
  window.addEventListener("afterprint", () => { opened.forEach((details) => { details.open = false; }); opened = []; });
})();
