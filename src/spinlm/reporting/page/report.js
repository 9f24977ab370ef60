// The page's own script: theme, charts, reloading while a run is going on, and the browser of held-out examples.
// Text of models and datasets reaches the page through textContent alone.
"use strict";

const byId = (id) => document.getElementById(id);

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children.filter((child) => child !== null));
  return made;
}

// --- what is kept from one reload to the next; a browser may refuse to keep anything ---

const KEPT_AS = `spinlm:${location.pathname}`;

function kept() {
  try {
    return JSON.parse(sessionStorage.getItem(KEPT_AS)) ?? {};
  } catch {
    return {};
  }
}

function keep(changes) {
  try {
    sessionStorage.setItem(KEPT_AS, JSON.stringify({ ...kept(), ...changes }));
  } catch {
    // then a reload begins anew
  }
}

// --- theme ---

function setUpTheme() {
  const button = byId("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
  const name = () => (button.textContent = isDark() ? "Light theme" : "Dark theme");
  if (kept().theme) document.documentElement.dataset.theme = kept().theme;
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    keep({ theme: document.documentElement.dataset.theme });
    name();
  });
  system.addEventListener("change", name);
  name();
  button.hidden = false;
}

// --- charts: colours are CSS variables, so that they follow the theme by themselves ---

const AXIS = {
  labelColor: "var(--muted)",
  titleColor: "var(--muted)",
  gridColor: "var(--line)",
  domainColor: "var(--line)",
  tickColor: "var(--line)",
  labelFontSize: 12,
  titleFontSize: 12,
  titleFontWeight: "normal",
  labelLimit: 200,
  labelOverlap: "greedy",
  labelSeparation: 6,
};
const CHARTS = {
  renderer: "svg",
  actions: false,
  ast: true, // expressions are interpreted: the page's policy forbids eval
  defaultStyle: false,
  tooltip: { disableDefaultStyle: true },
  config: {
    background: "transparent",
    font: getComputedStyle(document.body).fontFamily,
    view: { stroke: "transparent" },
    axis: AXIS,
    axisX: { grid: false },
    legend: { labelColor: "var(--text)", labelFontSize: 12 },
  },
};

async function drawCharts() {
  for (const plot of document.querySelectorAll(".plot")) {
    try {
      const drawing = element("div", { className: "drawing" });
      drawing.setAttribute("aria-hidden", "true"); // the plot around it says in words what it shows
      plot.replaceChildren(drawing);
      await vegaEmbed(drawing, JSON.parse(plot.nextElementSibling.textContent), CHARTS);
    } catch (error) {
      plot.textContent = `This chart can't be drawn: ${error.message}`;
    }
  }
}

// --- commands to copy ---

function setUpCopying() {
  for (const button of document.querySelectorAll(".copy")) {
    if (!navigator.clipboard) continue;
    button.hidden = false;
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(button.previousElementSibling.textContent);
      button.textContent = "Copied";
    });
  }
}

// --- reloading while the run is going on ---

const STALE_MINUTES = 60;

function setUpReloading() {
  const seconds = Number(document.body.dataset.refresh);
  if (!seconds) return;
  const pause = byId("pause");
  const show = (paused) => {
    pause.setAttribute("aria-pressed", String(paused));
    pause.textContent = paused ? "Go on reloading" : "Pause reloading";
  };
  pause.hidden = false;
  pause.addEventListener("click", () => {
    keep({ paused: !kept().paused });
    show(kept().paused);
  });
  show(Boolean(kept().paused));
  const minutes = (Date.now() - Date.parse(document.body.dataset.written)) / 60000;
  if (minutes > STALE_MINUTES && byId("stale")) {
    byId("stale").textContent = ` (${Math.round(minutes)} minutes ago: whether it still runs, spinlm status says)`;
  }
  setInterval(() => {
    if (kept().paused || isBeingUsed()) return;
    keepPlace();
    location.reload();
  }, seconds * 1000);
}

const IDLE_SECONDS = 10;
let lastTouched = -Infinity;
for (const kind of ["keydown", "pointerdown", "input"]) addEventListener(kind, () => (lastTouched = Date.now()), true);

function isBeingUsed() {
  const touched = Date.now() - lastTouched < IDLE_SECONDS * 1000;
  return touched || document.hidden || !getSelection().isCollapsed || document.querySelector("dialog[open]") !== null;
}

const allDetails = () => [...document.querySelectorAll("details")];

function keepPlace() {
  keep({ scroll: scrollY, focus: document.activeElement?.id, open: allDetails().map((details) => details.open) });
}

function goBackToPlace() {
  const { scroll, focus, open } = kept();
  keep({ scroll: undefined, focus: undefined, open: undefined });
  if (scroll === undefined) return;
  const details = allDetails();
  if (open.length === details.length) details.forEach((one, place) => (one.open = open[place]));
  if (focus) byId(focus)?.focus({ preventScroll: true });
  scrollTo({ top: scroll, behavior: "instant" });
}

// --- untrusted text ---

// Control characters and those that turn direction; joiners but where they are a part of Arabic, Indic and such scripts, or
// of emoji; carriage returns without a newline.
const UNSEEN =
  /\r(?!\n)|(?<![\u0590-\u1cff\ua800-\uabff\ufb1d-\ufdff\ufe70-\ufefc\u{10a00}-\u{11fff}\u2190-\u2bff\ufe0f\u{1f000}-\u{1faff}])[\u200c\u200d]|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\u{e0000}-\u{e007f}]|\p{Surrogate}/gu;

/** A text's nodes: characters that can't be seen, or that turn the direction of others, are shown by their code. */
function shown(text) {
  const nodes = [];
  let end = 0;
  text = text.replaceAll("\r\n", "\n");
  for (const found of text.matchAll(UNSEEN)) {
    nodes.push(text.slice(end, found.index));
    const code = found[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    nodes.push(element("span", { className: "unseen", textContent: `U+${code}` }));
    end = found.index + found[0].length;
  }
  nodes.push(text.slice(end));
  return nodes;
}

/** A number as it is said; of a player that has diverged, it may be none. */
const digits = (number) => number === null ? "not finite" : String(Number(number.toPrecision(3))).replace("-", "−");

/** How many characters all of some texts begin with, up to the end of a word. */
function commonBeginning(texts) {
  const [first = "", ...others] = texts;
  let end = others.length ? first.length : 0;
  for (const text of others) {
    let same = 0;
    while (same < end && text[same] === first[same]) same++;
    end = same;
  }
  return first.slice(0, end).search(/\S*$/u);
}

/** What tells a text from others that begin like it, on one line. */
function oneLine(text, beginning) {
  const rest = text.slice(beginning).trim() || text.trim();
  return shown((beginning ? "… " : "") + rest.split("\n", 1)[0].slice(0, 160));
}

// --- differences ---

const TOKENS = new RegExp(
  [
    String.raw`\s+`,
    String.raw`\p{Extended_Pictographic}[\ufe0f\p{EMod}]*(?:\u200d\p{Extended_Pictographic}[\ufe0f\p{EMod}]*)*`,
    String.raw`[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Thai}]`,
    String.raw`(?:(?![\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Thai}])[\p{L}\p{M}\p{N}_\u200c\u200d])+`,
    "[^]",
  ].join("|"),
  "gu",
);
const STEPS = 8_000_000; // of comparing two texts: less than a second, and 32 MB

const tokensOf = (text) => text.replaceAll("\r\n", "\n").match(TOKENS) ?? [];

/** For each token of `mine`, whether it is outside the longest common subsequence with `theirs`; null if that takes too long. */
function differing(mine, theirs) {
  const differs = new Array(mine.length).fill(true);
  const shorter = Math.min(mine.length, theirs.length);
  let start = 0;
  while (start < shorter && mine[start] === theirs[start]) differs[start++] = false;
  let tail = 0;
  while (tail < shorter - start && mine.at(-1 - tail) === theirs.at(-1 - tail)) differs[mine.length - 1 - tail++] = false;
  const same = (x, y) => mine[start + x] === theirs[start + y];
  const kept = keptTokens(mine.length - start - tail, theirs.length - start - tail, same);
  for (const x of kept ?? []) differs[start + x] = false;
  return kept && differs;
}

/**
 * What is kept of `width` tokens by the fewest deletions and insertions that make `height` others of them; null if that takes
 * too long. (Myers: An O(ND) Difference Algorithm and Its Variations, 1986.)
 */
function keptTokens(width, height, same) {
  if (width === 0 || height === 0) return [];
  const at = (diagonal) => diagonal + height + 1; // diagonal: x - y
  const furthest = new Int32Array(width + height + 3).fill(-1); // x on each diagonal, after so many edits
  furthest[at(1)] = 0;
  const rounds = [];
  for (let edits = 0, steps = 0; ; edits++) {
    const low = Math.max(-edits, edits - 2 * height); // no more can be inserted than there is, nor deleted
    const high = Math.min(edits, 2 * width - edits);
    steps += (high - low) / 2 + 1;
    if (steps > STEPS) return null;
    const moves = new Uint32Array((high - low) / 2 + 1); // twice the x that an edit leads to, and 1 if it inserts
    rounds.push({ low, moves });
    for (let k = low; k <= high; k += 2) {
      const inserts = k === -edits || (k !== edits && furthest[at(k - 1)] < furthest[at(k + 1)]);
      let x = inserts ? furthest[at(k + 1)] : furthest[at(k - 1)] + 1;
      moves[(k - low) / 2] = 2 * x + Number(inserts);
      while (x < width && x - k < height && same(x, x - k)) x++;
      furthest[at(k)] = x;
      if (x >= width && x - k >= height) return walkedBack(rounds, x, k);
    }
  }
}

/** The tokens on the path that ends at `x` on diagonal `k`. */
function walkedBack(rounds, x, k) {
  const kept = [];
  for (const { low, moves } of rounds.reverse()) {
    const move = moves[(k - low) / 2];
    while (x > move >> 1) kept.push(--x);
    if (move & 1) k++;
    else {
      k--;
      x--;
    }
  }
  return kept;
}

/** A text's nodes, with what differs from another text marked; null if they differ too much for that. */
function compared(text, other) {
  if (other === null) return shown(text);
  const tokens = tokensOf(text);
  const differs = differing(tokens, tokensOf(other))?.map((is, place) => is && tokens[place].trim() !== "");
  if (!differs) return null;
  const nodes = [];
  for (let start = 0; start < tokens.length; ) {
    let end = start;
    // blanks between two marked tokens are marked with them
    const isMarked = (place) => differs[place] || (tokens[place].trim() === "" && differs[place - 1] && differs[place + 1]);
    const marked = isMarked(start);
    while (end < tokens.length && Boolean(isMarked(end)) === Boolean(marked)) end++;
    const run = shown(tokens.slice(start, end).join(""));
    nodes.push(...(marked ? [element("mark", {}, ...run)] : run));
    start = end;
  }
  return nodes;
}

// --- the browser of held-out examples ---

async function readExamples() {
  const source = byId("examples-data");
  if (source.dataset.encoding === "json") return JSON.parse(source.textContent);
  const bytes = Uint8Array.from(atob(source.textContent), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

class Browser {
  constructor(data) {
    this.data = data;
    this.visible = []; // places in data.rows, in the order shown
    this.chosen = null; // one of them
    this.beginning = commonBeginning(data.rows.map((row) => row.prompt));
    for (const name of ["filter", "from", "to", "sort", "kind", "who", "against", "search", "list", "detail", "count"])
      this[name] = byId(name);
  }

  // What a filter or an order is computed from: always of the players chosen as from and to.

  outcome(row, player) {
    const of = row.players[player];
    if (this.kind.value !== "greedy" || !this.data.verified) return of.outcome;
    const right = of.greedy[0][3];
    return right === null ? null : Number(right);
  }

  /** By how much one did better than the other; null where that isn't known. */
  gain(row) {
    if (!this.data.players.length) return null;
    const [after, before] = [this.to, this.from].map(({ value }) => this.outcome(row, value));
    return after === null || before === null ? null : after - before;
  }

  responses(row, player) {
    return row.players[player]?.[this.kind.value] ?? [];
  }

  filters() {
    const { verified } = this.data;
    const of = (row) => this.responses(row, this.to.value);
    return {
      all: ["all", () => true],
      gained: [verified ? "gained: right more often" : "gained: the real response is likelier", (row) => (this.gain(row) ?? 0) > 0],
      lost: [verified ? "lost: right less often" : "lost: the real response is less likely", (row) => (this.gain(row) ?? 0) < 0],
      ...(verified && {
        right: ["right", (row) => of(row).length > 0 && of(row).every((cell) => cell[3] === true)],
        wrong: ["wrong", (row) => of(row).some((cell) => cell[3] === false)],
      }),
      cut: ["cut at the cap", (row) => of(row).some((cell) => cell[2])],
      same: ["equal to the real response", (row) => of(row).some((cell) => cell[0].trim() === row.real.trim())],
    };
  }

  orders() {
    const longest = (row) => Math.max(0, ...this.responses(row, this.to.value).map((cell) => cell[1]));
    const margin = (row) => row.players[this.to.value]?.margin;
    return {
      data: ["their order in the data", () => 0],
      gain: ["largest gain", (row) => -(this.gain(row) ?? -Infinity)],
      loss: ["largest loss", (row) => this.gain(row) ?? Infinity],
      longest: ["longest response", (row) => -longest(row)],
      margin: ["largest margin", (row) => -(margin(row) ?? -Infinity)],
      smallest: ["smallest margin", (row) => margin(row) ?? Infinity],
    };
  }

  setUp() {
    const { players, start, best } = this.data;
    const options = (select, entries) =>
      select.replaceChildren(...entries.map(([value, text]) => element("option", { value, textContent: text })));
    const titles = (named) => Object.entries(named).map(([value, [text]]) => [value, text]);
    options(this.from, players.map((name) => [name, name]));
    options(this.to, players.map((name) => [name, name]));
    options(this.kind, [["sampled", "sampled"], ...(this.data.greedy ? [["greedy", "greedy"]] : [])]);
    options(this.who, [["all", "all"], ["two", "only from and to"]]);
    options(this.filter, titles(this.filters()));
    options(this.sort, titles(this.orders()));
    options(this.against, [["real", "the real response"], ["before", "the player before"], ["nothing", "nothing"]]);
    this.from.value = start ?? players[0];
    this.to.value = best ?? players.at(-1);
    this.restore();
    for (const control of this.controls()) control.addEventListener("input", () => this.update());
    this.list.addEventListener("click", (event) => {
      const item = event.target.closest("li");
      if (item) this.choose(Number(item.dataset.place));
    });
    byId("browser").addEventListener("keydown", (event) => this.onKey(event));
    byId("browser").hidden = false;
    if (!players.length) byId("browser").querySelector(".controls").hidden = true;
    this.update();
  }

  controls() {
    return [this.filter, this.from, this.to, this.sort, this.kind, this.who, this.against, this.search];
  }

  restore() {
    const saved = kept().controls ?? {};
    for (const control of this.controls()) {
      const allowed = control.matches("input") || [...control.options].some(({ value }) => value === saved[control.id]);
      if (saved[control.id] !== undefined && allowed) control.value = saved[control.id];
    }
    this.chosen = this.data.rows.findIndex((row) => row.id === kept().example);
  }

  update() {
    const [, isShown] = this.filters()[this.filter.value];
    const [, key] = this.orders()[this.sort.value];
    const wanted = this.search.value.toLowerCase();
    const { rows } = this.data;
    const keys = new Map();
    for (const [place, row] of rows.entries())
      if (isShown(row) && (!wanted || this.contains(row, wanted))) keys.set(place, key(row));
    const difference = (a, b) => (keys.get(a) === keys.get(b) ? 0 : keys.get(a) - keys.get(b)); // of infinities too
    this.visible = [...keys.keys()].sort((a, b) => difference(a, b) || a - b);
    this.list.replaceChildren(...this.visible.map((place) => this.item(place)));
    this.count.textContent = `${this.visible.length} of ${rows.length} examples`;
    keep({ controls: Object.fromEntries(this.controls().map(({ id, value }) => [id, value])) });
    this.choose(this.visible.includes(this.chosen) ? this.chosen : (this.visible[0] ?? null));
  }

  contains(row, wanted) {
    const texts = [row.id, row.prompt, row.real];
    for (const player of this.data.players) for (const cell of this.responses(row, player)) texts.push(cell[0]);
    return texts.some((text) => text.toLowerCase().includes(wanted));
  }

  item(place) {
    const row = this.data.rows[place];
    const gain = this.gain(row);
    const chip =
      gain === 0 || gain === null
        ? null
        : element("span", { className: `chip ${gain > 0 ? "gained" : "lost"}`, textContent: gain > 0 ? "▲ gained" : "▼ lost" });
    const id = element("span", { className: "id" }, ...shown(row.id), " ");
    const item = element("li", { id: `example-${place}` }, element("span", { className: "line", dir: "auto" }, ...oneLine(row.prompt, this.beginning)), id);
    if (chip) item.append(chip);
    item.setAttribute("role", "option");
    item.setAttribute("aria-selected", "false");
    item.dataset.place = place;
    return item;
  }

  choose(place) {
    byId(`example-${this.chosen}`)?.setAttribute("aria-selected", "false");
    this.chosen = place;
    const item = byId(`example-${place}`);
    if (item === null) {
      this.list.removeAttribute("aria-activedescendant");
      this.detail.replaceChildren();
      return;
    }
    item.setAttribute("aria-selected", "true");
    this.list.setAttribute("aria-activedescendant", item.id);
    const below = item.offsetTop + item.offsetHeight - this.list.clientHeight;
    this.list.scrollTop = Math.min(item.offsetTop, Math.max(this.list.scrollTop, below)); // not the page
    keep({ example: this.data.rows[place].id });
    this.showDetail(this.data.rows[place]);
  }

  move(by) {
    const at = this.visible.indexOf(this.chosen);
    const to = Math.max(0, Math.min(this.visible.length - 1, at + by));
    if (this.visible.length) this.choose(this.visible[to]);
  }

  onKey(event) {
    if (event.target.matches("input, select") || event.ctrlKey || event.metaKey || event.altKey) return;
    const inList = event.target === this.list;
    const steps = { j: 1, k: -1, ...(inList && { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity }) };
    if (event.key in steps) this.move(steps[event.key]);
    else if (inList && event.key === "Enter") this.detail.focus();
    else return;
    event.preventDefault();
  }

  showDetail(row) {
    const at = this.visible.indexOf(this.chosen);
    const step = (text, by) => {
      const button = element("button", { type: "button", id: `step${by}`, textContent: text, disabled: this.visible[at + by] === undefined });
      button.addEventListener("click", () => {
        this.move(by);
        byId(`step${by}`).focus();
      });
      return button;
    };
    const title = element("h3", {}, ...shown(row.id), ` – ${at + 1} of ${this.visible.length}`);
    const prompt = element("div", { className: "text prompt", dir: "auto", tabIndex: 0 }, ...shown(row.prompt));
    prompt.setAttribute("role", "region");
    prompt.setAttribute("aria-label", "Prompt");
    const cards = [this.card("real response", [], [[row.real, row.tokens]], () => null, "is-real")];
    let before = [[row.real]];
    for (const player of this.data.players) {
      const cells = this.responses(row, player);
      const others = { real: [[row.real]], before, nothing: [] }[this.against.value];
      const isCompared = [this.from.value, this.to.value].includes(player);
      const other = (place) => (others[place] ?? others[0])?.[0] ?? null;
      if (isCompared || this.who.value === "all")
        cards.push(this.card(player, this.facts(row, player), cells, other, isCompared ? "is-compared" : ""));
      before = cells;
    }
    this.detail.replaceChildren(
      element("div", { className: "walk" }, title, step("Previous", -1), step("Next", 1)),
      prompt,
      element("div", { className: "responses" }, ...cards),
    );
  }

  facts(row, player) {
    const { margin, real } = row.players[player];
    return [`real response ${digits(real)} nats a token`, ...(margin === undefined ? [] : [`margin ${digits(margin)}`])];
  }

  card(name, facts, cells, other, className = "") {
    const chips = cells.flatMap(([, , cut, right]) => [
      ...(right === true || right === false ? [[right ? "right" : "wrong", right ? "✓ right" : "✗ wrong"]] : []),
      ...(cut ? [["cut", "cut at the cap"]] : []),
    ]);
    const unmarked = new Set();
    const texts = cells.map(([text], place) => {
      const nodes = compared(text, other(place));
      if (nodes === null) unmarked.add("differs too much to be marked");
      const shownText = element("div", { className: "text", dir: "auto", tabIndex: 0 }, ...(nodes ?? shown(text)));
      shownText.setAttribute("role", "region");
      shownText.setAttribute("aria-label", `${name}${cells.length > 1 ? `, ${place + 1}` : ""}`);
      return shownText;
    });
    const lengths = cells.map((cell) => cell[1]).join(", ");
    const roles = this.data.players.length ? [this.from, this.to].filter(({ value }) => value === name).map(({ id }) => id) : [];
    return element(
      "div",
      { className: `response ${className}` },
      element(
        "header",
        {},
        element("h4", { textContent: name }),
        ...roles.map((role) => element("span", { className: "chip", textContent: role })),
        ...chips.map(([kind, text]) => element("span", { className: `chip ${kind}`, textContent: text })),
      ),
      ...texts,
      element("p", { className: "facts-line", textContent: [`${lengths} tokens`, ...facts, ...unmarked].join(" · ") }),
    );
  }
}

async function setUpExamples() {
  if (!byId("examples-data")) return;
  try {
    new Browser(await readExamples()).setUp();
  } catch (error) {
    const failed = byId("examples-failed");
    failed.textContent = `The examples can't be shown by this browser (${error.message}). A newer one can.`;
    failed.hidden = false;
  }
}

async function start() {
  setUpTheme();
  setUpCopying();
  setUpReloading();
  await setUpExamples();
  document.body.dataset.ready = "true";
  await drawCharts();
  goBackToPlace();
  document.body.dataset.drawn = "true";
}

start();
