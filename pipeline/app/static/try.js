import { post, say } from "./common.js";

const root = document.querySelector("[data-try]");
const part = (name) => root.querySelector(`[data-${name}]`);
const form = root.querySelector("form");
const button = form.querySelector('[type="submit"]');
const drop = part("drop");
let photo = null;
let tried = null;

function wrong(text) {
  part("wrong").textContent = text;
  part("wrong").hidden = !text;
}

function take(file) {
  if (!file) return;
  photo = file;
  const preview = part("preview");
  URL.revokeObjectURL(preview.src);
  preview.src = URL.createObjectURL(file);
  preview.hidden = false;
  part("invite").hidden = true;
  button.disabled = false;
  wrong("");
}

function address(path) {
  const threshold = part("threshold").value;
  return `/try/${tried.token}/${path}?threshold=${threshold}`;
}

function showObjects() {
  root.querySelector('[data-side="objects"]').src = address("pictures/objects");
  for (const link of root.querySelectorAll("[data-save]")) link.href = address(`files/${link.dataset.save}`);
  for (const item of root.querySelectorAll(".found [data-score]")) {
    item.classList.toggle("is-below", Number(item.dataset.score) < Number(part("threshold").value));
  }
}

function showConfidence() {
  const name = part("confidence").value;
  root.querySelector('[data-side="confidence"]').src = `/try/${tried.token}/confidence?name=${encodeURIComponent(name)}`;
}

function row(object) {
  const item = document.createElement("li");
  item.dataset.score = object.score;
  const dot = document.createElement("span");
  dot.className = `swatch`;
  const name = document.createElement("span");
  name.textContent = object.name;
  const bar = document.createElement("meter");
  bar.max = 1;
  bar.value = object.score;
  const value = document.createElement("span");
  value.className = "value";
  value.textContent = object.score.toFixed(2);
  item.append(dot, name, bar, value);
  return item;
}

function show(answer) {
  tried = answer;
  part("result").hidden = false;
  part("waiting").hidden = true;
  const best = answer.present.find((it) => it.label_id > 0);
  part("confidence").replaceChildren(...answer.names.map((name) => new Option(name, name, false, best && name === best.name)));
  const rows = answer.objects.map(row);
  const none = document.createElement("li");
  none.className = "none";
  none.textContent = "none";
  part("objects-list").replaceChildren(...(rows.length ? rows : [none]));
  const [width, height] = answer.original;
  const reduced = width === answer.width ? "" : ` (the photo has ${width} × ${height})`;
  part("size").textContent = `Segmented at ${answer.width} × ${answer.height} pixels${reduced}.`;
  root.querySelector('[data-side="semantic"]').src = address("pictures/semantic");
  showObjects();
  showConfidence();
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (!photo) return;
  button.disabled = true;
  button.textContent = "Segmenting…";
  wrong("");
  const headers = { "Content-Type": "application/octet-stream", "X-Names": encodeURIComponent(part("names").value) };
  const answer = await post("/try", photo, headers);
  button.disabled = false;
  button.textContent = "Segment";
  if (answer.error) wrong(answer.error);
  else { show(answer); say("Done"); }
});
part("file").addEventListener("change", (event) => take(event.target.files[0]));
for (const name of ["dragover", "dragenter"]) drop.addEventListener(name, (event) => { event.preventDefault(); drop.classList.add("is-over"); });
for (const name of ["dragleave", "drop"]) drop.addEventListener(name, () => drop.classList.remove("is-over"));
drop.addEventListener("drop", (event) => { event.preventDefault(); take(event.dataTransfer.files[0]); });
part("threshold").addEventListener("input", () => { part("shown").textContent = Number(part("threshold").value).toFixed(2); });
part("threshold").addEventListener("change", showObjects);
part("confidence").addEventListener("change", showConfidence);
