// What the views share: posting with the token, saying what happened, keys.

const token = document.querySelector('meta[name="csrf-token"]').content;
const said = document.getElementById("said");
let timer = 0;

export function say(text, isWrong = false) {
  said.textContent = text;
  said.classList.toggle("is-wrong", isWrong);
  said.classList.add("is-shown");
  clearTimeout(timer);
  timer = setTimeout(() => said.classList.remove("is-shown"), isWrong ? 8000 : 2500);
}

// Posts JSON, or a file with headers; what the server answers, or null after saying what is wrong.
export async function post(path, body, headers = { "Content-Type": "application/json" }) {
  const data = body instanceof Blob ? body : JSON.stringify(body);
  try {
    const response = await fetch(path, { method: "POST", body: data, headers: { "X-CSRF-Token": token, ...headers } });
    const text = await response.text();
    const isJson = (response.headers.get("Content-Type") || "").includes("json");
    const answer = isJson ? JSON.parse(text) : { error: text.trim() };
    if (response.ok) return answer;
    return { error: answer.error || `the server answered ${response.status}` };
  } catch {
    return { error: "the app does not answer; is it still running?" };
  }
}

// Calls the handler of a key, unless it is typed into a field or meant for the browser.
export function onKeys(handlers) {
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest("input, select, textarea")) return;
    const handler = handlers[event.key];
    if (handler && handler(event) !== false) event.preventDefault();
  });
}

for (const field of document.querySelectorAll("[data-submits]")) {
  field.addEventListener("change", () => field.form.requestSubmit());
}
if (document.querySelector("[data-measuring]")) setTimeout(() => location.reload(), 4000);
