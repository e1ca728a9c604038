"use strict";
/* What scene.py wrote, and what follows of it: names, logical boxes, where they lie. Knows nothing of the page. */
const D = JSON.parse(document.getElementById("data").textContent);
/** Runs of a box along one direction that are worked out at most. */
const RUNS = 4000;

// Stored tensors: entry = {s: side, g: group, k: its number in the group}

const at = (column, k) => (Array.isArray(column) ? D.columns[column[0]][k] : column);
const nameOf = (e) => e.g.name.map((part, i) => (i % 2 ? at(part, e.k) : part)).join("");
const rankOf = (e) => (e.g.rank === undefined ? "" : D.ranks[at(e.g.rank, e.k)]);
const originOf = (e) => (e.g.origin === undefined ? null : e.g.origin.map((column) => at(column, e.k)));
/** The index by which sections tell tensors apart. */
const firstOf = (e) => (e.g.index.length ? at(e.g.index[0][1], e.k) : "");
const homeOf = (tensor) => D.tensors[tensor][2];

D.pictures = D.pictures.map(([shape, rows, columns, begin, shown, parts]) => ({
  shape, rows, columns, begin, shown, parts: parts.map(([row, column, axes]) => ({ row, column, axes })),
}));
/** Side -> logical tensor -> [group, part] of all that hold it. */
const holders = D.sides.map((side) => {
  const found = new Map();
  side.groups.forEach((g) => {
    g.homes = g.tensors.map(homeOf);
    g.homes.forEach((home, p) => found.set(home, [...(found.get(home) || []), [g, p]]));
  });
  return found;
});

/** The logical box of one part: axis -> [low, high). */
function boxOf(e, p) {
  const box = new Map(e.g.index.map(([axis, column]) => [axis, [at(column, e.k), at(column, e.k) + 1]]));
  const axes = D.pictures[e.g.picture].parts[p].axes;
  e.g.lo[p].forEach((lo, j) => box.set(axes[j][0], [lo, lo + axes[j][1]]));
  return box;
}

/** What `box` has in common with another, over the axes of the first; null if nothing. */
function common(box, other) {
  const found = new Map();
  for (const [axis, [low, high]] of box) {
    const [from, to] = other.get(axis) || [low, high];
    if (Math.max(low, from) >= Math.min(high, to)) return null;
    found.set(axis, [Math.max(low, from), Math.min(high, to)]);
  }
  return found;
}

/** Everywhere on a side that some of a logical box lies: [entry, part, box], `most` of them, and how many in all. */
function placesOf(s, home, box, most) {
  const found = [];
  let count = 0;
  for (const [g, p] of holders[s].get(home) || []) {
    if (!common(fixed(g, p), box)) continue;
    for (let k = 0; k < g.n; k++) {
      const inside = g.index.every(([axis, column]) => {
        const span = box.get(axis);
        return !span || (at(column, k) >= span[0] && at(column, k) < span[1]);
      });
      if (!inside) continue;
      count += 1;
      const e = { s, g, k };
      if (found.length < most) found.push([e, p, common(boxOf(e, p), box)]);
    }
  }
  return [found, count];
}

/** The logical box that all members of a group have in common. */
function fixed(g, p) {
  const axes = D.pictures[g.picture].parts[p].axes;
  return new Map(g.lo[p].map((lo, j) => [axes[j][0], [lo, lo + axes[j][1]]]));
}

/** A logical box in words, its axes in the order of the tensor. */
function spoken(box, home) {
  const order = [...new Set([...D.tensors[home][3], ...box.keys()])].filter((axis) => box.has(axis));
  return order.map((axis) => {
    const [low, high] = box.get(axis);
    return `${D.axes[axis]} ${high === low + 1 ? low : `${low}..${high - 1}`}`;
  }).join(", ");
}

/** The index in the whole stored tensor of an element at a row and column of the picture. */
function element(e, row, column) {
  const picture = D.pictures[e.g.picture];
  let offset = picture.begin + row * picture.columns + column;
  const index = [];
  for (const n of [...picture.shape].reverse()) {
    index.unshift(n ? offset % n : 0);
    offset = Math.floor(offset / (n || 1));
  }
  const origin = originOf(e);
  return index.map((i, d) => i + (origin ? origin[d] : 0));
}

// Blocks

/** As in geometry.py: where the runs of a box begin along one direction, their length, and the axes that part them. */
function spans(base, axes, most) {
  const outer = axes.filter(([, n, step]) => step && n > 1).sort((a, b) => a[2] - b[2]);
  let run = 1;
  while (outer.length && outer[0][2] === run) run *= outer.shift()[1];
  let starts = [base];
  for (const [, n, step] of outer.reverse()) {
    const next = [];
    for (const start of starts) for (let i = 0; i < n && next.length < most; i++) next.push(start + i * step);
    starts = next;
  }
  return { starts, run, outer };
}

/** The blocks of a part, or of the box that `inner` has in common with it. */
function blocks(e, p, inner, most = RUNS) {
  const part = D.pictures[e.g.picture].parts[p];
  let { row, column } = part;
  const axes = part.axes.map(([axis, n, down, across], j) => {
    const [low, high] = (inner && inner.get(axis)) || [e.g.lo[p][j], e.g.lo[p][j] + n];
    row += (low - e.g.lo[p][j]) * down;
    column += (low - e.g.lo[p][j]) * across;
    return [axis, high - low, down, across];
  });
  return {
    down: spans(row, axes.map(([axis, n, step]) => [axis, n, step]), most),
    across: spans(column, axes.map(([axis, n, , step]) => [axis, n, step]), most),
  };
}

const corner = ({ down, across }) => ({ row: down.starts[0], column: across.starts[0] });
/** A whole part, and where it begins. */
const whole = (e, p) => ({ e, p, box: boxOf(e, p), ...corner(blocks(e, p, null, 1)) });
