import { onKeys, post, say } from "./common.js";

const review = document.querySelector("[data-review]");

if (review) {
  const frames = [...review.querySelectorAll(".frame")];
  const part = (name) => review.querySelector(`[data-${name}]`);
  const badge = review.querySelector(".inspector .badge");
  let shown = null;

  const address = (frame, what) => `/pictures/sample/${frame.dataset.number}/${what}?v=${review.dataset.version}&large=1`;
  const past = { accept: "accepted", reject: "rejected" };

  function showVerdict(frame) {
    const verdict = frame.dataset.verdict;
    badge.textContent = past[verdict] || "";
    badge.className = `badge ${verdict}`;
  }

  async function look(frame, { focus = true } = {}) {
    if (!frame) return;
    if (shown) shown.removeAttribute("aria-current");
    shown = frame;
    frame.setAttribute("aria-current", "true");
    if (focus) frame.focus({ preventScroll: true });
    for (const pane of review.querySelectorAll("[data-pane]")) pane.src = address(frame, pane.dataset.pane);
    part("name").textContent = frame.dataset.category;
    part("swatch").className = `swatch colour-${frame.dataset.label}`;
    part("place").textContent = `disagreement ${frame.dataset.disagreement}`;
    showVerdict(frame);
    const response = await fetch(`/labels/facts/${frame.dataset.number}?v=${review.dataset.version}`);
    if (!response.ok || shown !== frame) return;
    const facts = await response.json();
    const similarity = facts.similarity === null ? "" : `, similarity ${facts.similarity.toFixed(3)}`;
    part("file").textContent = `${facts.file} · rank ${facts.rank}${similarity}${facts.has_mask ? "" : " · empty mask"}`;
    part("present").replaceChildren(...facts.present.map((it) => {
      const item = document.createElement("li");
      const swatch = document.createElement("span");
      swatch.className = `swatch colour-${Math.max(it.label_id, 0)}`;
      item.append(swatch, `${it.name} ${Math.round(100 * it.share)} %`);
      return item;
    }));
  }

  function step(by) {
    const place = frames.indexOf(shown) + by;
    if (place >= 0 && place < frames.length) return look(frames[place]);
    const link = review.querySelector(by > 0 ? 'a[rel="next"]' : 'a[rel="prev"]');
    if (link) location.assign(link.href);
    else say(by > 0 ? "This was the last one" : "This is the first one");
    return null;
  }

  function apply(answer) {
    if (answer.error) {
      say(answer.error, true);
      return null;
    }
    document.querySelector("[data-accepted]").textContent = answer.accepted;
    document.querySelector("[data-rejected]").textContent = answer.rejected;
    let changed = null;
    for (const change of answer.changes) {
      for (const frame of frames) {
        if (frame.dataset.key === change.key && frame.dataset.category === change.category) {
          frame.dataset.verdict = change.verdict || "";
          changed = frame;
        }
      }
    }
    showVerdict(shown);
    return changed;
  }

  async function decide(verdict) {
    const frame = shown;
    const taken = frame.dataset.verdict === verdict ? null : verdict;
    if (!apply(await post("/labels/change", { number: Number(frame.dataset.number), verdict: taken, version: review.dataset.version }))) return;
    say(taken ? `${past[taken][0].toUpperCase()}${past[taken].slice(1)}; u undoes` : "Undecided again");
    if (taken && shown === frame) step(1);
  }

  async function undo() {
    const answer = await post("/labels/undo", {});
    const changed = apply(answer);
    if (changed) { say("Undone"); look(changed); }
    else if (!answer.error) say(`Undone, on another page: ${answer.changes[0].category}, ${answer.changes[0].key}`);
  }

  const acts = { accept: () => decide("accept"), reject: () => decide("reject"), undo };
  review.addEventListener("click", (event) => {
    const act = event.target.closest("[data-act]");
    const frame = event.target.closest(".frame");
    if (act) acts[act.dataset.act]();
    else if (frame) look(frame);
  });
  onKeys({
    a: acts.accept, r: acts.reject, u: undo,
    ArrowRight: () => step(1), ArrowDown: () => step(1), ArrowLeft: () => step(-1), ArrowUp: () => step(-1),
  });
  look(frames[0], { focus: false });
}
