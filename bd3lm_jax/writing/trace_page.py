"""The web pages of `trace.py`: the record of one model takes the place of the word RECORD, its pages that of FRAMES."""

PAGE = r"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>How a text was written</title>
<style>
:root { color-scheme: light dark; --line: #8886; --quiet: #888; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
.bar { display: flex; gap: .6rem; align-items: center; flex-wrap: wrap; margin: .8rem 0; }
input[type=range] { flex: 1; min-width: 10rem; }
button, select { font: inherit; min-width: 2.4rem; }
#text { border: 1px solid var(--line); border-radius: .5rem; padding: 1rem; min-height: 6rem; white-space: pre-wrap;
  font: 16px/1.9 ui-monospace, monospace; overflow-wrap: anywhere; }
#text span { border-radius: .2rem; }
.drawn { color: #111; cursor: pointer; }
.mask { color: var(--quiet); }
.now { outline: 2px solid #d00; }
.again { outline: 2px dashed #d00; text-decoration: line-through; color: var(--quiet); }
.after { opacity: .25; }
.scale { width: 9rem; height: .8rem; border-radius: .2rem;
  background: linear-gradient(90deg, rgb(253,174,97), rgb(255,255,191), rgb(145,207,230)); }
small, #what { color: var(--quiet); }
#what { min-height: 3em; }
</style>
</head>
<body>
<h1>How a text was written</h1>
<div id="title"></div>
<div class="bar">
  <label>Text <select id="sample"></select></label>
  <button id="first" title="first step (Home)">|&lt;</button>
  <button id="back" title="one step back (left arrow)">&lt;</button>
  <button id="play" title="play (space)">Play</button>
  <button id="next" title="one step on (right arrow)">&gt;</button>
  <button id="last" title="last step (End)">&gt;|</button>
  <input id="slider" type="range" min="0" value="0" aria-label="step">
</div>
<div id="status" aria-live="polite"></div>
<div id="text"></div>
<div id="what">Point at a token to see its history; click it to go to the step that revealed it.</div>
<div class="bar"><small>confidence 0</small><div class="scale"></div><small>1</small>
  <small><span class="now">revealed now</span></small> <small><span class="again">masked again</span></small>
  <small class="mask">░ mask</small> <small class="after">after the end of the text</small></div>
<small>Confidence: probability of a token when it was drawn, before temperature and filters. Arrows left and right:
steps; up and down: texts; space: play.</small>
<script type="application/json" id="record">RECORD</script>
<script>
"use strict";
const record = JSON.parse(document.getElementById("record").textContent);
const at = name => document.getElementById(name);
let sample = record.samples[0], shown = 0, timer = null;
at("title").textContent = record.title;

function colour(confidence) {
  const stops = [[253, 174, 97], [255, 255, 191], [145, 207, 230]];
  const i = confidence < 0.5 ? 0 : 1, part = confidence * 2 - i;
  return "rgb(" + stops[i].map((a, k) => Math.round(a + (stops[i + 1][k] - a) * part)).join(",") + ")";
}

function rowAfter(count) {  // every place of the row after so many steps
  const row = sample.canvas.map(id => ({id: id, given: id !== record.mask, history: []}));
  sample.steps.slice(0, count).forEach((step, index) => {
    const now = index === count - 1;
    for (const [place, id, confidence] of step.revealed)
      Object.assign(row[place], {id: id, confidence: confidence, since: index + 1, block: step.block, now: now});
    for (const [place, id, confidence] of step.revealed)
      row[place].history.push("step " + (index + 1) + " " + quoted(id) + " confidence " + confidence.toFixed(3));
    for (const place of step.remasked) {
      row[place].history.push("step " + (index + 1) + " masked again");
      Object.assign(row[place], {gone: row[place].id, id: record.mask, now: false, again: now});
    }
  });
  return row;
}

function quoted(id) { return "\u201c" + record.pieces[id] + "\u201d"; }

function told(token, place) {
  if (token.given) return "place " + place + ": given";
  const block = token.block === undefined ? "" : ", block " + token.block;
  return "place " + place + block + ": " + (token.history.join("; ") || "not revealed yet");
}

function draw() {
  const text = at("text"), row = rowAfter(shown), step = sample.steps[shown - 1];
  text.replaceChildren();
  let ended = false;
  row.forEach((token, place) => {
    const span = document.createElement("span"), masked = token.id === record.mask;
    span.textContent = record.pieces[token.again ? token.gone : token.id] || "\u2591";
    const drawn = !masked && !token.given;
    span.className = [drawn ? "drawn" : masked ? "mask" : "", token.now ? "now" : "", token.again ? "again" : "",
                      ended ? "after" : ""].join(" ").trim();
    if (drawn) {
      span.style.background = colour(token.confidence);
      span.onclick = () => show(token.since);
    }
    span.title = told(token, place);
    span.onmouseenter = () => { at("what").textContent = span.title; };
    ended = ended || (drawn && token.id === record.end);
    text.append(span);
  });
  const over = shown === sample.steps.length && sample.stop ? ", stop: " + sample.stop : "";
  at("status").textContent = "step " + shown + " of " + sample.steps.length
    + (step ? ", block " + step.block + ", step " + step.step + " of the block, " + step.nfe + " network calls" : "")
    + over;
  at("slider").max = sample.steps.length;
  at("slider").value = shown;
}

function show(count) { shown = Math.max(0, Math.min(sample.steps.length, count)); draw(); }
function choose(index) {
  index = Math.max(0, Math.min(record.samples.length - 1, index));
  sample = record.samples[index];
  at("sample").selectedIndex = index;
  show(sample.steps.length);
}
function play(on) {
  clearInterval(timer);
  timer = on ? setInterval(() => { show(shown + 1); if (shown === sample.steps.length) play(false); }, 150) : null;
  at("play").textContent = on ? "Pause" : "Play";
}
function toggle() { if (timer === null && shown === sample.steps.length) show(0); play(timer === null); }

record.samples.forEach(one => at("sample").append(new Option("sample " + one.number)));
at("sample").onchange = event => choose(event.target.selectedIndex);
at("slider").oninput = event => show(Number(event.target.value));
at("first").onclick = () => show(0);
at("back").onclick = () => show(shown - 1);
at("play").onclick = toggle;
at("next").onclick = () => show(shown + 1);
at("last").onclick = () => show(sample.steps.length);
const keys = {ArrowLeft: () => show(shown - 1), ArrowRight: () => show(shown + 1), Home: () => show(0),
  End: () => show(sample.steps.length), " ": toggle, ArrowUp: () => choose(at("sample").selectedIndex - 1),
  ArrowDown: () => choose(at("sample").selectedIndex + 1)};
document.addEventListener("keydown", event => {
  if (keys[event.key]) { event.preventDefault(); keys[event.key](); }
});
if (sample) choose(0);
</script>
</body>
</html>
"""

BESIDE = r"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>How texts were written, side by side</title>
<style>
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 1rem; }
#frames { display: flex; gap: 1rem; height: 90vh; }
iframe { flex: 1; min-width: 0; border: 1px solid #8886; border-radius: .5rem; }
button { font: inherit; }
</style>
</head>
<body>
<button id="play">Play all from the start</button> <small>A step takes the same time in each.</small>
<div id="frames">
FRAMES
</div>
<script>
"use strict";
document.getElementById("play").onclick = () => {
  for (const frame of document.querySelectorAll("iframe")) {
    frame.contentWindow.show(0);
    frame.contentWindow.play(true);
  }
};
</script>
</body>
</html>
"""
