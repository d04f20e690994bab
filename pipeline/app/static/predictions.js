import "./common.js";

const slider = document.querySelector("[data-threshold]");
const shown = document.querySelector("[data-shown]");

function refresh() {
  for (const picture of document.querySelectorAll("img[data-objects]")) {
    const address = new URL(picture.src);
    address.searchParams.set("threshold", slider.value);
    picture.src = address.href;
  }
  for (const item of document.querySelectorAll(".found [data-score]")) {
    item.classList.toggle("is-below", Number(item.dataset.score) < Number(slider.value));
  }
  const here = new URL(location.href);
  here.searchParams.set("threshold", slider.value);
  history.replaceState(null, "", here);
}

if (slider) {
  slider.addEventListener("input", () => { shown.textContent = Number(slider.value).toFixed(2); });
  slider.addEventListener("change", refresh);
}
