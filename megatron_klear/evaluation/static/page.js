"use strict";
const benchmarks = JSON.parse(document.getElementById("data").textContent);

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

// One response at a time: which verdict, which of them, and its text as text (never as markup).
function browse(root, { responses, total }) {
  let shown = responses, place = 0;
  const verdicts = [...new Set(responses.map((one) => one.verdict))].sort();
  const filter = element("select", { ariaLabel: "verdict" }, element("option", { value: "", textContent: "all verdicts" }));
  filter.append(...verdicts.map((verdict) => element("option", { value: verdict, textContent: verdict })));
  const back = element("button", { textContent: "‹ previous" }), on = element("button", { textContent: "next ›" });
  const told = element("span", { className: "soft" });
  const question = element("div", { className: "question" }), text = element("div", { className: "response" });
  const note = element("p", { className: "soft" });
  function show() {
    const one = shown[place];
    back.disabled = place <= 0;
    on.disabled = place >= shown.length - 1;
    told.textContent = one
      ? `${place + 1} of ${shown.length}: ${one.problem}, sample ${one.number}, ${one.verdict}, ${one.tokens} tokens` +
        (one.finish === "length" ? ", cut off" : "")
      : "none";
    question.textContent = one ? one.question : "";
    note.textContent = one ? one.note : "";
    text.textContent = one ? one.text : "";
  }
  filter.onchange = () => {
    shown = responses.filter((one) => !filter.value || one.verdict === filter.value);
    place = 0;
    show();
  };
  back.onclick = () => { place -= 1; show(); };
  on.onclick = () => { place += 1; show(); };
  root.append(element("div", { className: "controls" }, filter, back, on, told), question, note, text);
  if (responses.length < total) {
    root.append(element("p", { className: "soft", textContent: `${responses.length} of ${total} responses are on this page; all are in responses.jsonl.` }));
  }
  show();
}

document.querySelectorAll(".browser").forEach((root) => browse(root, benchmarks[Number(root.dataset.benchmark)]));
