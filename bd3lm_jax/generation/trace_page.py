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
h1 { font-size: 1.5rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
p.quiet { margin: .2rem 0 1rem; color: var(--quiet); }
.bar { display: flex; gap: .6rem; align-items: center; flex-wrap: wrap; margin: .8rem 0; }
input[type=range] { flex: 1; min-width: 10rem; }
button, select { font: inherit; min-width: 2.4rem; }
#text { border: 1px solid var(--line); border-radius: .5rem; padding: 1rem; min-height: 6rem; white-space: pre-wrap;
  font: 16px/1.9 ui-monospace, monospace; overflow-wrap: anywhere; }
#text span { border-radius: .2rem; }
.drawn { color: #111; cursor: pointer; }
.mask { color: var(--quiet); }
.now { box-shadow: inset 0 -.2rem #1f6feb; }
.again { text-decoration: line-through; color: var(--quiet); }
.after { opacity: .25; }
.scale { width: 9rem; height: .8rem; border-radius: .2rem;
  background: linear-gradient(90deg, rgb(244,109,67), rgb(254,224,139), rgb(230,245,152), rgb(102,194,165)); }
small, #what { color: var(--quiet); }
#what { min-height: 3em; }
@media (max-width: 40rem) {
  body { margin: 1rem auto; }
  #text { font-size: 14px; padding: .6rem; }
  button { min-height: 2.4rem; }
}
</style>
</head>
<body>
<h1 id="title"></h1>
<p class="quiet">How a text was written, step by step</p>
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
<div class="bar"><small>probability .001</small>
  <div class="scale" title="logarithmic: .001, .01, .1, 1"></div><small>1</small>
  <small><span class="now">changed now</span></small> <small><span class="again">masked again</span></small>
  <small class="mask">░ mask</small> <small class="after">after the end of the text</small></div>
<small>Colour: probability of a token when it was drawn, before temperature and filters, on a logarithmic scale. Arrows
left and right: steps; up and down: texts; space: play.</small>
<script type="application/json" id="record">RECORD</script>
<script>
"use strict";
const record = JSON.parse(document.getElementById("record").textContent);
const at = name => document.getElementById(name);
let sample = record.samples[0], shown = 0, timer = null;
at("title").textContent = record.title;

function colour(confidence) {
  const stops = [[244, 109, 67], [254, 224, 139], [230, 245, 152], [102, 194, 165]];  // .001, .01, .1, 1
  const at = 3 + Math.log10(Math.min(1, Math.max(0.001, confidence)));
  const i = Math.min(2, Math.floor(at)), part = at - i;
  return "rgb(" + stops[i].map((a, k) => Math.round(a + (stops[i + 1][k] - a) * part)).join(",") + ")";
}

function rowAfter(count) {  // every place of the row after so many steps
  const row = sample.canvas.map(id => ({id: id, given: id !== record.mask, history: []}));
  sample.steps.slice(0, count).forEach((step, index) => {
    const now = index === count - 1;
    for (const [place, id, confidence] of step.revealed)  // a token that was drawn again is not a change
      Object.assign(row[place], {id: id, confidence: confidence, since: index + 1, block: step.block,
                                 now: now && row[place].before !== id, again: false});
    for (const [place, id, confidence] of step.revealed)
      row[place].history.push("step " + (index + 1) + " " + quoted(id) + " confidence " + confidence.toFixed(3));
    for (const [place, id] of step.revealed) row[place].before = id;
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
  show(0);
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
if (sample) {
  choose(0);
  if (window.parent === window && !matchMedia("(prefers-reduced-motion: reduce)").matches) play(true);
}
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
@media (max-width: 50rem) {
  #frames { flex-direction: column; height: auto; }
  iframe { flex: none; height: 80vh; }
}
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
