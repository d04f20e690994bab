import { onKeys, post, say } from "./common.js";

const tiles = [...document.querySelectorAll("[data-tiles] .tile")];
const total = document.querySelector("[data-dropped]");
const pending = document.querySelector("[data-pending]");

function current() {
  const tile = document.activeElement && document.activeElement.closest(".tile");
  return tiles.includes(tile) ? tile : null;
}

function columns(tile) {
  return tiles.filter((other) => other.offsetTop === tile.offsetTop && other.parentElement === tile.parentElement).length;
}

function move(step) {
  const tile = current();
  const place = tile ? tiles.indexOf(tile) + (Math.abs(step) === 1 ? step : Math.sign(step) * columns(tile)) : 0;
  const next = tiles[Math.min(Math.max(place, 0), tiles.length - 1)];
  if (next) {
    next.focus();
    next.scrollIntoView({ block: "nearest" });
  }
}

function show(tile, isDropped) {
  if (tile.classList.contains("is-dropped") === isDropped) return;
  tile.classList.toggle("is-dropped", isDropped);
  const button = tile.querySelector('[data-act="drop"]');
  if (button) button.textContent = isDropped ? "Restore" : "Drop";
  tile.setAttribute("aria-label", tile.getAttribute("aria-label").replace(/, dropped$/, "") + (isDropped ? ", dropped" : ""));
  if (total && !tile.closest("[data-others]")) count(Number(total.textContent) + (isDropped ? 1 : -1));
}

function count(value) {
  total.textContent = String(value);
  pending.hidden = value === 0;
}

function apply(answer) {
  if (answer.error) {
    say(answer.error, true);
    return false;
  }
  for (const change of answer.changes) {
    for (const tile of tiles) {
      if (tile.dataset.key === change.key && tile.dataset.category === change.category) show(tile, change.verdict === "drop");
    }
  }
  return true;
}

async function toggle(tile) {
  if (!tile) return;
  const isDropped = tile.classList.contains("is-dropped");
  const body = { category: tile.dataset.category, verdict: isDropped ? null : "drop", images: [tile.dataset.key] };
  if (apply(await post("/archives/change", body))) say(isDropped ? "Restored" : "Dropped; u undoes");
}

async function undo() {
  const answer = await post("/archives/undo", {});
  if (apply(answer)) say(answer.changes.length === 1 ? "Undone" : `Undone: ${answer.changes.length} images`);
}

if (total) {
  count(Number(total.textContent));
  document.addEventListener("click", (event) => {
    const act = event.target.closest("[data-act]");
    if (act) act.dataset.act === "undo" ? undo() : toggle(act.closest(".tile"));
  });
  onKeys({
    ArrowRight: () => move(1), ArrowLeft: () => move(-1), ArrowDown: () => move(2), ArrowUp: () => move(-2),
    d: () => toggle(current()), u: undo,
    n: () => { const link = current() && current().querySelector(".acts a"); if (link) location.assign(link.href); },
  });
}

const alike = document.querySelector("[data-alike]");
if (alike) {
  const boxes = [...alike.querySelectorAll('input[name="key"]')];
  const button = alike.querySelector('[type="submit"]');
  const chosen = () => boxes.filter((box) => box.checked && !box.disabled).map((box) => box.value);
  const refresh = () => {
    alike.querySelector("[data-count]").textContent = String(chosen().length);
    button.disabled = chosen().length === 0;
  };
  alike.addEventListener("change", refresh);
  refresh();
  alike.addEventListener("submit", async (event) => {
    event.preventDefault();
    button.disabled = true;
    const answer = await post("/archives/change", { category: alike.dataset.category, verdict: "drop", images: chosen() });
    if (answer.error) { say(answer.error, true); refresh(); } else location.assign(alike.dataset.back);
  });
  onKeys({
    ArrowRight: () => move(1), ArrowLeft: () => move(-1), ArrowDown: () => move(2), ArrowUp: () => move(-2),
    " ": () => { const tile = current(); if (!tile) return false; tile.querySelector("input").click(); return true; },
  });
}
