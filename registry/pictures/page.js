/* The page: rows of drawings in sections, what is chosen in them, and search. */
/** How many of each are shown at once, and how many places and matches are looked up. */
const SECTIONS = 150, PAGE = 25, CARDS = 12, DRAWINGS = 8, MATCHES = 400, PLACES = 24;

/** The stored tensors of one name: their drawings, and a button for each logical tensor in them. */
function card({ entries, pictures }, scale) {
  const made = make("div", "card", name(nameOf(entries[0])));
  const shapes = make("div", "drawings");
  paged(shapes, pictures, (one) => figure(one, scale), DRAWINGS, "drawings");
  const chips = make("div", "chips");
  const seen = new Set();
  entries.forEach((e) => e.g.tensors.forEach((tensor, p) => {
    if (seen.has(tensor)) return;
    seen.add(tensor);
    const chip = button("chip", () => choose(whole(e, p), true), swatch(homeOf(tensor)), name(D.tensors[tensor][0]));
    chip.part = { e, p };
    chip.addEventListener("focus", () => chip.matches(":focus-visible") && !returning && choose(whole(e, p), false));
    chips.append(chip);
  }));
  made.append(shapes, chips);
  return made;
}

// What is chosen: under the pointer, under the focus, or pinned by a click

let pinned = false;
let back = null; // the name that is pinned, to which the focus goes back
let returning = false;
const panel = make("section", "panel");
panel.setAttribute("aria-live", "polite");
panel.setAttribute("aria-label", "the chosen block");
panel.hidden = true;

/** The block of a part that a pointer is over. */
function under(target, event) {
  const { drawing, cell, p } = target;
  const frame = drawing.svg.getBoundingClientRect();
  const { width, height } = drawing.svg.viewBox.baseVal;
  const x = ((event.clientX - frame.left) / frame.width) * width - 1;
  const y = ((event.clientY - frame.top) / frame.height) * height - 1;
  const { down, across } = blocks(cell.e, p, null);
  const box = boxOf(cell.e, p);
  /** The run at a position; the box becomes that of the run. */
  const run = ({ starts, outer }, position) => {
    const k = Math.max(starts.findLastIndex((start) => start <= position), 0);
    let rest = k;
    for (const [axis, n] of [...outer].reverse()) {
      const low = box.get(axis)[0] + (rest % n);
      box.set(axis, [low, low + 1]);
      rest = Math.floor(rest / n);
    }
    return starts[k];
  };
  const row = run(down, y / drawing.scale.y - cell.row), column = run(across, x / drawing.scale.x - cell.column);
  return { e: cell.e, p, box, row, column };
}

function choose(chosen, pin) {
  pinned = pin;
  const { e, p, box } = chosen;
  const home = e.g.homes[p];
  for (const { mark, cells, scale } of drawn) {
    const marks = [];
    for (const cell of cells) {
      cell.e.g.homes.forEach((other, q) => {
        const shared = other === home && common(boxOf(cell.e, q), box);
        if (!shared) return;
        const d = path(blocks(cell.e, q, shared), cell, scale);
        if (d) marks.push(draw("path", { class: "mark", fill: fill(home), d }));
      });
    }
    mark.replaceChildren(...marks);
  }
  document.body.classList.add("chosen");
  describe(chosen);
}

const ranked = (e) => (rankOf(e) ? ` (${rankOf(e)})` : "");

function describe({ e, p, box, row, column }) {
  const home = e.g.homes[p], tensor = e.g.tensors[p];
  const tied = tensor === home ? "" : make("span", "", " (the same as ", name(D.tensors[home][0]), ")");
  const what = make("div", "", swatch(home), " ", make("strong", "", name(D.tensors[tensor][0])), tied, " ",
    make("span", "box", spoken(box, home)));
  const rest = [
    make("div", "", `${D.sides[e.s].title}: `, name(nameOf(e)),
      `${ranked(e)} from element [${element(e, row, column).join(", ")}], ${e.g.dtype}`),
    make("div", "help", "rule ", name(`${e.g.rule}: ${e.g.layout}`), e.g.values && ` (${e.g.values})`),
  ];
  D.sides.forEach((side, s) => {
    if (s === e.s) return;
    const [found, count] = placesOf(s, home, box, PLACES);
    const list = make("ul", "", ...found.map((one) => make("li", "", place(one, home, box))));
    if (count > found.length) list.append(make("li", "none", `and ${count - found.length} more`));
    rest.push(make("div", "", count ? `${side.title}:` : `${side.title}: nothing on this page`), list);
  });
  const close = pinned ? button("close", () => release(true, true), "close") : "";
  panel.replaceChildren(make("div", "head", what, close), ...rest);
  panel.hidden = false;
}

/** Where some of a box lies on the other side, and the way there. */
function place([e, p, part], home, box) {
  const { row, column } = corner(blocks(e, p, part, 1));
  const said = spoken(part, home);
  const own = said === spoken(box, home) ? "" : `${said} `;
  const rest = `${ranked(e)} ${own}from element [${element(e, row, column).join(", ")}]`;
  return button("place", () => jump(e), name(nameOf(e)), rest);
}

/** Nothing is chosen any more; what is pinned stays unless `all`, and with `refocus` the focus goes back. */
function release(all, refocus) {
  if (pinned && !all) return;
  pinned = false;
  latest = null;
  panel.hidden = true;
  document.body.classList.remove("chosen");
  for (const drawing of drawn) drawing.mark.replaceChildren();
  returning = true;
  if (refocus && back && back.isConnected) back.focus();
  returning = false;
  back = null;
}

/** What the pointer was over when it last moved. */
let latest = null;

document.addEventListener("pointermove", (event) => {
  if (event.pointerType === "touch" || pinned) return;
  if (!(event.target instanceof Element) || panel.contains(event.target)) return;
  const chip = event.target.closest(".card .chip");
  if (!event.target.target && !chip) {
    if (!document.activeElement.matches(".card .chip")) release(false);
    return;
  }
  const { e, p, row, column, box } = chip ? whole(chip.part.e, chip.part.p) : under(event.target.target, event);
  const now = [e.g, e.k, p, row, column, Boolean(chip)];
  if (latest && now.every((one, i) => one === latest[i])) return;
  choose({ e, p, row, column, box }, false);
  latest = now;
});
document.addEventListener("click", (event) => {
  const chip = event.target.closest(".card .chip");
  if (event.target.target) choose(under(event.target.target, event), true);
  else if (chip) {
    back = chip;
    panel.querySelector("button").focus();
  } else if (!panel.contains(event.target)) release(true);
});
document.addEventListener("keydown", (event) => event.key === "Escape" && release(true, true));

// Rows: what holds the same logical tensors on both sides stands side by side

/** Rows of cards, a list for each side: cards that share a logical tensor at the same indices are in one row. */
function rowsOf(entries) {
  const cards = new Map();
  for (const e of entries) {
    const key = `${e.s} ${firstOf(e)} ${nameOf(e)}`;
    if (!cards.has(key)) cards.set(key, []);
    cards.get(key).push(e);
  }
  const shared = new Map(); // logical tensor -> the axes that tell apart its holders everywhere
  const parent = new Map();
  const root = (key) => (parent.get(key) === key ? key : (parent.set(key, root(parent.get(key))), parent.get(key)));
  const join = (a, b) => {
    for (const key of [a, b]) if (!parent.has(key)) parent.set(key, key);
    parent.set(root(b), root(a));
  };
  for (const e of entries) for (const home of e.g.homes) {
    const own = e.g.index.map(([axis]) => axis);
    shared.set(home, shared.has(home) ? shared.get(home).filter((axis) => own.includes(axis)) : own);
  }
  for (const [key, members] of cards) for (const e of members) for (const home of e.g.homes) {
    const index = new Map(e.g.index);
    join(`of ${home} ${shared.get(home).map((axis) => at(index.get(axis), e.k))}`, `card ${key}`);
  }
  const rows = new Map();
  for (const [key, members] of cards) {
    const group = parent.has(`card ${key}`) ? root(`card ${key}`) : `card ${key}`;
    if (!rows.has(group)) rows.set(group, D.sides.map(() => []));
    rows.get(group)[members[0].s].push(members);
  }
  return [...rows.values()];
}

function fillRows(parent, entries) {
  const heads = make("div", "heads", ...D.sides.map((side) => make("div", "", `${side.title}: `, name(side.format))));
  parent.replaceChildren(heads);
  paged(parent, rowsOf(entries), rowMade, PAGE, "rows");
}

function rowMade(row) {
  const sides = row.map((cards) => cards.map((own) => ({ entries: own, pictures: figures(own) })));
  const scale = fitting(sides.flat().flatMap(({ pictures }) => pictures));
  return make("div", "row", ...sides.map((cards) => {
    const side = make("div", "side");
    if (!cards.length) side.append(make("div", "none", "nothing here"));
    paged(side, cards, (one) => card(one, scale), CARDS, "tensors");
    return side;
  }));
}

/** Drawings that have left the page need no marks. */
function forget() {
  drawn = drawn.filter((drawing) => drawing.svg.isConnected);
}

// Sections: one for each index of the first axis that tells tensors apart, drawn when it is opened

function sections() {
  const found = new Map([["", { title: "the whole model", axis: null, counts: D.sides.map(() => 0) }]]);
  D.sides.forEach((side, s) => side.groups.forEach((g) => {
    for (let k = 0; k < g.n; k++) {
      const [axis, column] = g.index[0] || [null];
      const value = column === undefined ? 0 : at(column, k);
      const key = axis === null ? "" : `${axis} ${value}`;
      const title = `${D.axes[axis]} ${value}`;
      if (!found.has(key)) found.set(key, { title, axis, value, counts: D.sides.map(() => 0) });
      found.get(key).counts[s] += 1;
    }
  }));
  const used = [...found.values()].filter(({ counts }) => counts.some(Boolean));
  return used.sort((a, b) => (a.axis ?? -1) - (b.axis ?? -1) || a.value - b.value);
}

function members({ axis, value }) {
  const found = [];
  D.sides.forEach((side, s) => side.groups.forEach((g) => {
    if ((g.index[0] ? g.index[0][0] : null) !== axis) return;
    for (let k = 0; k < g.n; k++) if (axis === null || at(g.index[0][1], k) === value) found.push({ s, g, k });
  }));
  return found;
}

function section(one, open) {
  const body = make("div", "rows");
  const counts = one.counts.map((n) => n.toLocaleString("en")).join(" \u2192 ");
  const summary = make("summary", "", one.title, " ", make("small", "", `stored tensors: ${counts}`));
  const made = make("details", "section", summary, body);
  made.addEventListener("toggle", () => {
    if (made.open) fillRows(body, members(one));
    else body.replaceChildren();
    forget();
  });
  made.open = open;
  return made;
}

// Search

function matching(words) {
  const found = [];
  const counts = D.sides.map(() => 0);
  D.sides.forEach((side, s) => side.groups.forEach((g) => {
    const always = g.tensors.map((tensor) => D.tensors[tensor][0]).join(" ").toLowerCase();
    const rest = words.filter((word) => !always.includes(word));
    for (let k = 0; k < g.n; k++) {
      const e = { s, g, k };
      const own = rest.length ? `${nameOf(e)} ${rankOf(e)}`.toLowerCase() : "";
      if (!rest.every((word) => own.includes(word))) continue;
      counts[s] += 1;
      if (counts[s] <= MATCHES) found.push(e);
    }
  }));
  return [found, counts];
}

/** Matches, and what they lie beside on the other side. */
function beside(found) {
  const key = (e) => `${e.s} ${nameOf(e)} ${rankOf(e)} ${originOf(e)}`;
  const all = new Map(found.map((e) => [key(e), e]));
  for (const e of found.slice(0, 2 * PAGE)) {
    for (let s = 0; s < D.sides.length; s++) {
      if (s === e.s) continue;
      e.g.homes.forEach((home, p) => {
        for (const [other] of placesOf(s, home, boxOf(e, p), PLACES)[0]) all.set(key(other), other);
      });
    }
  }
  return [...all.values()];
}

const results = make("div", "results");
const browse = make("div", "browse");
const count = make("span", "count");
count.setAttribute("role", "status");
const input = make("input");
input.type = "search";
input.placeholder = "search: a stored or logical name, or a rank";
input.setAttribute("aria-label", "search by stored name, logical name or rank");
let waiting = 0;
input.addEventListener("input", () => {
  clearTimeout(waiting);
  waiting = setTimeout(search, 120);
});

function search() {
  release(true);
  const words = (input.value.toLowerCase().match(/"[^"]*"|\S+/g) || []).map((word) => word.replace(/^"(.*)"$/, "$1"));
  browse.hidden = words.length > 0;
  results.replaceChildren();
  count.textContent = "";
  if (words.length) {
    const [found, counts] = matching(words);
    count.textContent = counts.map((n) => n.toLocaleString("en")).join(" \u2192 ");
    if (found.length) fillRows(results, beside(found));
    else results.append(make("p", "none", "No tensor has all of these words in its name, logical names or rank."));
    if (counts.some((n) => n > MATCHES)) {
      results.append(make("p", "warning", `The first ${MATCHES} of a side are listed: add a word to see others.`));
    }
  }
  forget();
}

/** Scroll to a stored tensor, which is searched for if it is not on the page. */
function jump(e) {
  const shows = (d) => d.svg.getClientRects().length && d.cells.some((cell) => cell.e.g === e.g && cell.e.k === e.k);
  let there = drawn.find(shows);
  if (!there) {
    input.value = `"${nameOf(e)}"`;
    search();
    there = drawn.find(shows);
  }
  const figure = there && there.svg.closest("figure");
  if (figure) {
    figure.tabIndex = -1;
    figure.scrollIntoView({ block: "center" });
    figure.focus({ preventScroll: true });
  }
}

// The page

function legend() {
  const chips = make("div", "chips");
  paged(chips, D.tensors.filter(([, , home], t) => home === t), ([text, , home]) => button("chip", () => {
    input.value = `"${text}"`;
    search();
  }, swatch(home), name(text)), 60, "logical tensors");
  const few = order.size <= D.colours.length * LOOKS.length;
  const said = few ? "a colour and a pattern each" : "more than there are patterns: some look alike";
  return make("details", "legend", make("summary", "", "Logical tensors ", make("small", "", said)), chips);
}

if (D.sides.length < 2) document.body.classList.add("single");
const facts = D.facts.map(([key, value]) => make("div", "", make("dt", "", key), make("dd", "name", value)));
const HELP = "Each stored tensor is drawn as rows and columns, the last dimension across; those side by side are to " +
  "one scale, unless blocks would be too thin to see. A block is a box of a logical tensor. Point at one, tap it, or " +
  "go to a name with the Tab key: the panel says what it is, and the same elements are marked on the other side. " +
  "Grey is padding. A dashed frame is a corner of a tensor that has too many blocks to draw.";
const all = sections();
paged(browse, all, (one) => section(one, all.indexOf(one) < 2), SECTIONS, "sections");
const warnings = D.leftOut.map((text) => make("p", "warning", text));
document.body.append(fills(),
  make("header", "", make("h1", "", D.title), make("dl", "", ...facts), ...warnings),
  make("div", "bar", make("div", "", input, count)),
  make("main", "", make("p", "help", HELP), legend(), results, browse), panel);
