"use strict";
// The page to label on. All that it knows is in the element "record"; texts become text nodes, never HTML.
const record = JSON.parse(document.getElementById("record").textContent);
const images = record.images, names = record.class_names;
const KEYS = "123456789abcdefghijklmnopqrstuvwxyz";
const many = names.length > KEYS.length; // then digits are the likeliest classes, and letters search
const place = `coreg-label:${record.key}`;
const $ = id => document.getElementById(id);

// An answer is a list of classes, empty for none of them; null where there is none.
let answers = record.answers || images.map(() => null);
let unsaved = new Set(); // images whose answers the server does not have
let past = []; // [image, the answer that it had], for undo
let at = 0, chosen = [], keeps = true, sending = false, finished = false;

function element(kind, text, properties = {}) {
  const made = Object.assign(document.createElement(kind), properties);
  if (text !== undefined) made.textContent = text;
  return made;
}

// ---- what is kept in the browser ------------------------------------------------------------------------------------

function isAnswer(value) {
  const whole = Array.isArray(value) && value.every(c => Number.isInteger(c) && c >= 0 && c < names.length);
  return value === null || (whole && (record.several || value.length < 2));
}

function recall() {
  try {
    const kept = JSON.parse(localStorage.getItem(place) || "{}");
    if (!Array.isArray(kept.answers) || kept.answers.length !== images.length || !kept.answers.every(isAnswer)) return;
    if (!record.served) answers = kept.answers;
    for (const i of record.served && Array.isArray(kept.unsaved) ? kept.unsaved : []) {
      if (i in images) { answers[i] = kept.answers[i]; unsaved.add(i); }
    }
  } catch { keeps = false; }
}

function keep() {
  try { localStorage.setItem(place, JSON.stringify({answers, unsaved: [...unsaved]})); keeps = true; } catch { keeps = false; }
}

// ---- answers --------------------------------------------------------------------------------------------------------

function set(i, answer) {
  answers[i] = answer;
  if (record.served) unsaved.add(i);
  keep();
  send();
}

function answer(classes) {
  if (at >= images.length) return;
  past.push([at, answers[at]]);
  set(at, [...classes].sort((a, b) => a - b));
  go(next(at + 1));
}

function next(from) {
  while (from < images.length && answers[from] !== null) from++;
  return from;
}

function skip() {
  if (at < images.length) { past.push([at, answers[at]]); go(next(at + 1)); }
}

function undo() {
  if (!past.length) return;
  const [i, before] = past.pop();
  if (JSON.stringify(answers[i]) !== JSON.stringify(before)) set(i, before);
  go(i);
}

function pick(c) {
  if (!record.several) return answer([c]);
  chosen = chosen.includes(c) ? chosen.filter(other => other !== c) : [...chosen, c];
  $("search").value = "";
  show();
}

function go(i) {
  at = i;
  chosen = at < images.length ? [...(answers[at] || [])] : [];
  $("search").value = "";
  $("search").blur();
  show();
}

// ---- the server, where there is one ---------------------------------------------------------------------------------

async function send() {
  if (!record.served || sending || !unsaved.size) return showState();
  sending = true;
  const sent = [...unsaved], body = JSON.stringify({answers: Object.fromEntries(sent.map(i => [i, answers[i]]))});
  try {
    await post("answers", body);
    const written = JSON.parse(body).answers;
    for (const i of sent) if (JSON.stringify(written[i]) === JSON.stringify(answers[i])) unsaved.delete(i);
    $("trouble").textContent = "";
  } catch (error) {
    $("trouble").textContent = `Not saved: ${error.message}. Your answers are kept in this browser; save them as a file below.`;
    sending = false;
    return showState();
  }
  sending = false;
  keep();
  return unsaved.size ? send() : showState();
}

async function post(where, body) {
  let reply;
  try {
    reply = await fetch(where, {method: "POST", headers: {"Content-Type": "application/json"}, body});
  } catch { throw new Error("coreg-label does not answer"); }
  if (!reply.ok) throw new Error((await reply.json().catch(() => ({}))).trouble || `its answer was ${reply.status}`);
}

async function finish() {
  await send();
  if (unsaved.size) return;
  try { await post("done", "{}"); finished = true; } catch (error) { $("trouble").textContent = `${error.message}.`; }
  show();
}

// ---- the file -------------------------------------------------------------------------------------------------------

function cells(i) {
  const answer = answers[i], columns = record.columns.length - 1;
  if (answer === null) return Array(columns).fill("");
  if (!record.several) return [answer.length ? names[answer[0]] : record.none];
  return [answer.map(c => names[c]).join(";"), names.filter((_, c) => !answer.includes(c)).join(";")];
}

function csv() {
  const rows = [record.columns, ...images.map((image, i) => [image.path, ...cells(i)]), ...record.others];
  const quoted = cell => /[",\r\n]/.test(cell) ? `"${cell.replaceAll('"', '""')}"` : cell;
  return rows.map(row => row.map(quoted).join(",") + "\r\n").join("");
}

// names of files that are no UTF-8 have their bytes written as U+DC80 to U+DCFF
function bytes(text) {
  const parts = text.split(/((?<![\ud800-\udbff])[\udc80-\udcff])/);
  return parts.map((part, i) => i % 2 ? Uint8Array.of(part.charCodeAt(0) & 255) : part);
}

function download() {
  const link = element("a", "", {download: "label_next.csv"});
  link.href = URL.createObjectURL(new Blob(bytes(csv()), {type: "text/csv"}));
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

async function copy() {
  $("text").value = csv();
  try {
    await navigator.clipboard.writeText($("text").value);
  } catch {
    $("as-text").open = true;
    $("text").select();
    document.execCommand("copy");
  }
  $("copied").textContent = "Copied.";
}

// ---- what is to be seen ---------------------------------------------------------------------------------------------

function shownClasses() {
  const words = $("search").value.trim().toLowerCase(), all = names.map((_, c) => c);
  if (words) {
    const starts = all.filter(c => names[c].toLowerCase().startsWith(words));
    return [...starts, ...all.filter(c => !starts.includes(c) && names[c].toLowerCase().includes(words))].slice(0, 60);
  }
  if (!many) return all;
  const likely = images[at].likely.map(([c]) => c).slice(0, 9);
  return [...likely, ...chosen.filter(c => !likely.includes(c))];
}

function keyOf(c, i) {
  if ($("search").value.trim()) return i === 0 ? "Enter" : "";
  return many ? (i < 9 ? KEYS[i] : "") : KEYS[c];
}

function button(c, i) {
  const made = element("button", undefined, {type: "button"}), key = keyOf(c, i);
  const name = element("span");
  // long names break where their words do
  for (const word of names[c].split(/(?<=[\p{Ll}\d])(?=\p{Lu})|(?<=[_/.-])/u)) name.append(word, element("wbr"));
  made.append(element("kbd", key.toUpperCase()), name);
  if (!key) made.firstChild.hidden = true;
  const one = answers[at] !== null && answers[at].includes(c);
  made.setAttribute("aria-pressed", String(record.several ? chosen.includes(c) : one));
  made.addEventListener("click", () => pick(c));
  return made;
}

function describe(answer) {
  return answer === null ? "–" : answer.map(c => names[c]).join(", ") || (record.several ? "no label" : record.none);
}

function showImage() {
  const image = images[at], guess = image.likely.slice(0, 2).map(([c, p]) => `${names[c]} ${Math.round(100 * p)} %`);
  const picture = $("picture");
  if (picture.dataset.at !== String(at)) {
    picture.src = image.picture;
    picture.alt = image.path;
    picture.dataset.at = String(at);
  }
  $("path").textContent = image.path;
  $("guess").textContent = guess.length ? `The network hesitates: ${guess.join(", ")}.` : "";
  $("classes").replaceChildren(...shownClasses().map(button));
  $("confirm").hidden = !record.several;
  $("more").textContent = many && !$("search").value ? `${names.length} classes: type letters to search` : "";
  const none = answers[at] !== null && !answers[at].length;
  $("none").setAttribute("aria-pressed", String(none));
}

function showAll() {
  const all = $("all");
  if (!all.children.length) {
    all.append(...images.map((image, i) => {
      const one = element("button", undefined, {type: "button", title: image.path});
      one.append(element("img", undefined, {src: image.picture, alt: "", loading: "lazy"}), element("span"));
      if (image.picture.startsWith("data:image/png")) one.firstChild.className = "pixels";
      one.addEventListener("click", () => { go(i); scrollTo(0, 0); });
      return one;
    }));
  }
  [...all.children].forEach((one, i) => {
    one.lastChild.textContent = describe(answers[i]);
    one.setAttribute("aria-current", String(i === at));
    one.setAttribute("aria-label", `Image ${i + 1}: ${describe(answers[i])}`);
  });
}

// without the picture and the buttons: a button that is replaced while it is pressed would not be clicked
function showState() {
  const done = answers.filter(answer => answer !== null).length, over = at >= images.length;
  const state = !record.served ? (keeps ? "kept in this browser" : "NOT kept by this browser: save before you close the page")
    : finished ? "saved" : unsaved.size ? "saving …" : "saved";
  $("count").textContent = `${done} of ${images.length} answered, ${state}`;
  $("progress").value = done;
  $("progress").max = images.length;
  $("where").textContent = over ? "" : `Image ${at + 1} of ${images.length}`;
  $("work").hidden = over || finished;
  $("end").hidden = !over && !finished;
  $("again").hidden = finished || done === images.length;
  $("again").textContent = `Go over the ${images.length - done} without an answer`;
  $("outcome").textContent = finished ? `Saved in ${record.file}. This page can be closed.`
    : done === images.length ? "All images have an answer." : `${done} answered; the others stay unlabelled, which is fine.`;
  $("undo").disabled = $("undo-end").disabled = !past.length || finished;
}

function show() {
  showState();
  if (at < images.length) showImage();
  if ($("overview").open) showAll();
  if ($("as-text").open) $("text").value = csv();
}

// ---- keys -----------------------------------------------------------------------------------------------------------

function press(event) {
  if (event.altKey || finished) return;
  const searching = document.activeElement === $("search"), found = $("search").value.trim() ? shownClasses() : [];
  if (event.key === "Escape") { $("search").value = ""; $("search").blur(); show(); return; }
  if ((event.ctrlKey || event.metaKey) && event.key === "z" && !searching) { event.preventDefault(); undo(); return; }
  if (event.ctrlKey || event.metaKey || event.target === $("text")) return;
  if (searching) {
    if (event.key !== "Enter") return;
    event.preventDefault();
    if (found.length) pick(found[0]);
    else if (record.several && !$("search").value) answer(chosen);
    return;
  }
  // Enter and Space on a button that was reached by Tab press that button
  const onButton = document.activeElement instanceof HTMLButtonElement || document.activeElement.tagName === "SUMMARY";
  if (onButton && (event.key === "Enter" || event.key === " ") && document.activeElement.matches(":focus-visible")) return;
  if (event.repeat) return event.preventDefault(); // a key that is held down answers once
  const letter = event.key.length === 1 ? event.key.toLowerCase() : "";
  const index = letter ? KEYS.indexOf(letter) : -1;
  if (event.key === "Backspace") undo();
  else if (at >= images.length) return;
  else if (event.key === " " || event.key === "ArrowRight") skip();
  else if (event.key === "0") answer([]);
  else if (event.key === "Enter" && record.several) answer(chosen);
  else if (event.key === "/") $("search").focus();
  else if (many && index >= 0 && index < 9) { if (index < shownClasses().length) pick(shownClasses()[index]); }
  else if (many && /^\p{L}$/u.test(letter)) { $("search").focus(); return; } // the letter goes into the field
  else if (!many && index >= 0 && index < names.length) pick(index);
  else return;
  event.preventDefault();
}

recall();
$("search-line").hidden = names.length <= 9;
document.addEventListener("keydown", press);
// a button that was clicked does not keep the keys
document.addEventListener("click", event => {
  if (event.detail && document.activeElement instanceof HTMLButtonElement) document.activeElement.blur();
});
$("search").addEventListener("input", show);
for (const [id, act] of Object.entries({
  undo, "undo-end": undo, skip, none: () => answer([]), confirm: () => answer(chosen), download, copy, finish,
  "download-end": download, "copy-end": copy, again: () => go(next(0)), "save-now": () => go(images.length),
})) $(id).addEventListener("click", act);
for (const id of ["overview", "as-text"]) $(id).addEventListener("toggle", show);
addEventListener("storage", event => { if (event.key === place && !record.served) { recall(); show(); } });
addEventListener("beforeunload", event => { if (unsaved.size || (!keeps && past.length)) event.preventDefault(); });
go(next(0));
if (unsaved.size) send();
