"use strict";
(() => {
  const LARGEST = 40;
  const STEP = 1.5;
  const PAGE = 100;
  const dialog = document.querySelector("dialog");

  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }

  const clamp = (value, least, most) => Math.min(Math.max(value, least), most);

  // Plots. A picture is zoomed by its viewBox, so it stays sharp.
  function zoomable(frame) {
    const view = frame.querySelector(".view");
    const svg = view.querySelector("svg");
    const whole = svg.getAttribute("viewBox");
    const [left, top, width, height] = whole.split(/[\s,]+/).map(Number);
    const output = frame.querySelector("output");
    const pointers = new Map();
    let scale = 1;
    let pixels; // to a unit of the picture where it is whole
    let x;
    let y;

    /** A point on the screen, in units of the picture. */
    const inPicture = (point) => new DOMPoint(point.x, point.y).matrixTransform(svg.getScreenCTM().inverse());

    function middle() {
      const box = view.getBoundingClientRect();
      return inPicture({ x: box.x + box.width / 2, y: box.y + box.height / 2 });
    }

    function show() {
      frame.classList.toggle("zoomed", scale > 1);
      output.textContent = `${Math.round(scale * 100)} %`;
      const [w, h] = [view.clientWidth, view.clientHeight].map((side) => side / pixels / scale);
      // A side that does not fill the view is centred in it.
      x = w < width ? clamp(x, left, left + width - w) : left + (width - w) / 2;
      y = h < height ? clamp(y, top, top + height - h) : top + (height - h) / 2;
      const part = [x, y, w, h].map((value) => +value.toFixed(4));
      svg.setAttribute("viewBox", scale > 1 ? part.join(" ") : whole);
    }

    function zoom(factor, point = middle()) {
      if (scale === 1) {
        pixels = svg.getScreenCTM().a;
        ({ x, y } = inPicture(view.getBoundingClientRect()));
      }
      const wanted = scale * factor;
      const next = wanted < 1.001 ? 1 : Math.min(wanted, LARGEST); // in and out again may miss 1 by a rounding error
      x = point.x - (point.x - x) * (scale / next);
      y = point.y - (point.y - y) * (scale / next);
      scale = next;
      show();
    }

    function pan(dx, dy) {
      if (scale === 1) return;
      x += dx;
      y += dy;
      show();
    }

    /** Middle and spread of the fingers on the picture, or the mouse alone. */
    function grip() {
      const points = [...pointers.values()];
      const mean = (axis) => points.reduce((sum, point) => sum + point[axis], 0) / points.length;
      const [first, second] = points;
      const spread = second ? Math.hypot(first.x - second.x, first.y - second.y) : 1;
      return { x: mean("x"), y: mean("y"), spread };
    }

    const actions = {
      in: () => zoom(STEP),
      out: () => zoom(1 / STEP),
      reset: () => zoom(0),
      enlarge: () => (dialog.open ? dialog.close() : enlarge(frame, actions.reset)),
    };
    frame.querySelector(".tools").hidden = false;
    for (const button of frame.querySelectorAll("button")) {
      button.addEventListener("click", () => actions[button.dataset.do]());
    }

    const step = () => width / scale / 10;
    const keys = {
      "+": actions.in,
      "=": actions.in,
      "-": actions.out,
      0: actions.reset,
      ArrowLeft: () => pan(-step(), 0),
      ArrowRight: () => pan(step(), 0),
      ArrowUp: () => pan(0, -step()),
      ArrowDown: () => pan(0, step()),
    };
    view.addEventListener("keydown", (event) => {
      const modified = event.ctrlKey || event.metaKey || event.altKey;
      // Of a whole picture the arrows scroll the page.
      if (modified || !(event.key in keys) || (event.key.startsWith("Arrow") && scale === 1)) return;
      event.preventDefault();
      keys[event.key]();
    });

    view.addEventListener("dblclick", (event) => (scale > 1 ? zoom(0) : zoom(2 * STEP, inPicture(event))));

    // The wheel alone scrolls the page; a touchpad's pinch arrives as Ctrl and wheel.
    view.addEventListener(
      "wheel",
      (event) => {
        if (!(event.ctrlKey || event.metaKey || dialog.open)) return;
        event.preventDefault();
        const turn = event.deltaMode === WheelEvent.DOM_DELTA_PIXEL ? event.deltaY : event.deltaY * 20;
        zoom(Math.exp(-clamp(turn, -50, 50) / 100), inPicture(event));
      },
      { passive: false },
    );

    // One finger scrolls the page until the picture is zoomed; two never do.
    view.addEventListener(
      "touchstart",
      (event) => {
        if (event.touches.length > 1 && event.cancelable) event.preventDefault();
      },
      { passive: false },
    );
    view.addEventListener("pointerdown", (event) => {
      if (event.pointerType === "mouse" && (event.button !== 0 || scale === 1)) return;
      pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
      view.setPointerCapture(event.pointerId);
    });
    view.addEventListener("pointermove", (event) => {
      if (!pointers.has(event.pointerId)) return;
      const before = grip();
      pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
      const after = grip();
      const [from, to] = [inPicture(before), inPicture(after)];
      pan(from.x - to.x, from.y - to.y);
      if (after.spread !== before.spread) zoom(after.spread / before.spread, inPicture(after));
    });
    for (const ending of ["pointerup", "pointercancel"]) {
      view.addEventListener(ending, (event) => pointers.delete(event.pointerId));
    }
  }

  /** Moves a plot to a screen of its own, and back when that is closed; `reset` shows the whole of it. */
  function enlarge(frame, reset) {
    const place = frame.parentElement;
    const button = frame.querySelector("[data-do=enlarge]");
    reset();
    dialog.append(frame);
    dialog.showModal();
    button.textContent = "Close";
    button.focus();
    const putBack = () => {
      reset();
      button.textContent = "Enlarge";
      place.prepend(frame);
      button.focus();
    };
    dialog.addEventListener("close", putBack, { once: true });
  }

  // Numbers. Columns of text are stored as codes into the texts that occur.
  function read(element) {
    const columns = JSON.parse(element.textContent);
    const names = columns.map((column) => column.name);
    const numeric = columns.map((column) => "values" in column);
    const values = columns.map((c) => c.values ?? c.codes.map((code) => c.levels[code]));
    const rows = Array.from(values[0], (_, i) => values.map((column) => column[i]));
    return { names, numeric, rows };
  }

  const plain = (value) => (Array.isArray(value) ? value.join(" ") : value === null ? "" : String(value));

  function shown(value) {
    if (Array.isArray(value) && value.length > 1) {
      const items = value.map((name) => make("li", {}, name));
      return make("details", { class: "runs" }, make("summary", {}, `${value.length} runs`), make("ul", {}, ...items));
    }
    if (typeof value !== "number") return plain(value) || "–";
    const short = String(Number.isInteger(value) ? value : Number(value.toPrecision(6)));
    return short === String(value) ? short : make("span", { title: value }, short);
  }

  const collator = new Intl.Collator("en", { numeric: true });

  const order = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : collator.compare(plain(a), plain(b)));

  const csvField = (value) => (/[",\r\n]/.test(plain(value)) ? `"${plain(value).replaceAll('"', '""')}"` : plain(value));

  function numbers(details) {
    const source = details.querySelector("script");
    const { names, numeric, rows } = read(source);
    let chosen = rows;
    let column = -1;
    let descending = false;

    const filter = make("input", { type: "search", placeholder: "all words must occur" });
    const status = make("span", { role: "status" });
    const download = make("button", { type: "button" }, "Download CSV");
    const more = make("button", { type: "button" });
    const body = make("tbody");
    const heads = names.map((name, i) => {
      const button = make("button", { type: "button" }, name);
      button.addEventListener("click", () => sort(i));
      return make("th", { scope: "col", class: numeric[i] ? "number" : "" }, button);
    });
    const table = make("table", {}, make("thead", {}, make("tr", {}, ...heads)), body);
    const label = `Numbers of ${details.closest("article").querySelector("h3").textContent}`;
    details.append(
      make("div", { class: "controls" }, make("label", {}, "Filter ", filter), download, status),
      make("div", { class: "scroll tall", role: "region", tabindex: 0, "aria-label": label }, table),
      more,
    );

    function grow() {
      const next = chosen.slice(body.rows.length, body.rows.length + PAGE);
      const cell = (value, i) => make("td", { class: numeric[i] ? "number" : "" }, shown(value));
      body.append(...next.map((row) => make("tr", {}, ...row.map(cell))));
      const left = chosen.length - body.rows.length;
      more.textContent = `Show ${Math.min(left, PAGE)} more`;
      more.hidden = left === 0;
      const [all, found, seen] = [rows, chosen, body.rows].map((list) => list.length.toLocaleString("en"));
      status.textContent = `${all === found ? all : `${found} of ${all}`} rows, ${seen} shown`;
    }

    function update() {
      const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
      chosen = rows.filter((row) => {
        const text = row.map(plain).join(" ").toLowerCase();
        return words.every((word) => text.includes(word));
      });
      if (column >= 0) {
        const known = chosen.filter((row) => row[column] !== null).sort((a, b) => order(a[column], b[column]));
        // What has no value comes last either way.
        const unknown = chosen.filter((row) => row[column] === null);
        chosen = [...(descending ? known.reverse() : known), ...unknown];
      }
      heads.forEach((head, i) => {
        head.setAttribute("aria-sort", i !== column ? "none" : descending ? "descending" : "ascending");
      });
      body.replaceChildren();
      grow();
    }

    /** Ascending, descending, and as plotted. */
    function sort(i) {
      if (i !== column) [column, descending] = [i, false];
      else if (descending) column = -1;
      else descending = true;
      update();
    }

    download.addEventListener("click", () => {
      const lines = [names, ...chosen].map((row) => row.map(csvField).join(","));
      const url = URL.createObjectURL(new Blob([`${lines.join("\r\n")}\r\n`], { type: "text/csv" }));
      make("a", { href: url, download: source.dataset.file }).click();
      setTimeout(() => URL.revokeObjectURL(url), 10_000);
    });
    filter.addEventListener("input", update);
    more.addEventListener("click", grow);
    update();
  }

  document.querySelectorAll(".frame").forEach(zoomable);
  for (const details of document.querySelectorAll("details.numbers")) {
    details.addEventListener("toggle", () => numbers(details), { once: true });
  }

  // On a small screen the contents would fill the first page.
  if (matchMedia("(max-width: 68rem)").matches) document.querySelector("nav details").open = false;

  // Paper shows which runs each row is made of.
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details.runs:not([open])")];
    for (const details of opened) details.open = true;
  });
  addEventListener("afterprint", () => {
    for (const details of opened) details.open = false;
  });
})();
