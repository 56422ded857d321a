"use strict";
// One recording at a time: sent to the server, its words shown, played and saved from here.

const $ = (id) => document.getElementById(id);
const DOUBTFUL = 0.6;
let request = null;

function say(text, isError = false) {
  $("status").textContent = text;
  $("status").className = isError ? "error" : "";
}

function authorization() {
  const key = $("key").value.trim();
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function about() {
  const { model, limits } = await (await fetch("/health")).json();
  $("about").textContent =
    `${model} · files up to ${limits.upload_mb} MB, ${Math.round(limits.duration_s / 60)} minutes`;
}

async function transcribe(file) {
  request?.abort();
  request = new AbortController();
  const { signal } = request;
  $("result").hidden = true;
  $("player").src = URL.createObjectURL(file);
  $("player").hidden = false;
  say(`Transcribing ${file.name} …`);
  const form = new FormData();
  form.append("file", file);
  form.append("response_format", "verbose_json");
  form.append("timestamp_granularities[]", "word");
  form.append("timestamp_granularities[]", "segment");
  const began = performance.now();
  try {
    const options = { method: "POST", body: form, headers: authorization(), signal };
    const response = await fetch("/v1/audio/transcriptions", options);
    const answer = await response.json();
    if (!response.ok) throw new Error(answer.error.message);
    const seconds = (performance.now() - began) / 1000;
    show(answer);
    say(`${answer.duration.toFixed(1)} s of audio in ${seconds.toFixed(1)} s`);
  } catch (error) {
    if (!signal.aborted) say(error.message, true);
  }
}

function show({ text, words, srt }) {
  $("words").replaceChildren(...words.flatMap((word) => [button(word), " "]));
  if (!words.length) $("words").textContent = "No speech was found.";
  offer("text", text + "\n");
  offer("srt", srt);
  $("copy").onclick = async () => {
    await navigator.clipboard.writeText(text);
    say("Copied.");
  };
  $("result").hidden = false;
}

function button({ word, start, end, confidence }) {
  const made = document.createElement("button");
  made.type = "button";
  made.className = "word";
  made.textContent = word;
  made.dataset.start = start;
  made.dataset.end = end;
  made.title = `${start.toFixed(2)} s`;
  if (confidence !== undefined) {
    made.title += `, confidence ${confidence.toFixed(2)}`;
    made.style.opacity = 0.45 + 0.55 * Math.min(1, confidence / 0.9);
    made.classList.toggle("doubtful", confidence < DOUBTFUL);
  }
  made.onclick = () => {
    $("player").currentTime = start;
    $("player").play();
  };
  return made;
}

function offer(id, content) {
  URL.revokeObjectURL($(id).href);
  $(id).href = URL.createObjectURL(new Blob([content], { type: "text/plain;charset=utf-8" }));
}

$("player").ontimeupdate = () => {
  const now = $("player").currentTime;
  for (const word of document.querySelectorAll(".word")) {
    word.classList.toggle("now", word.dataset.start <= now && now < word.dataset.end);
  }
};
$("file").onchange = () => $("file").files[0] && transcribe($("file").files[0]);
for (const name of ["dragover", "dragleave", "drop"]) {
  $("drop").addEventListener(name, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", name === "dragover");
    if (name === "drop" && event.dataTransfer.files[0]) transcribe(event.dataTransfer.files[0]);
  });
}
$("drop").onkeydown = (event) => {
  if (event.key === "Enter" || event.key === " ") $("file").click();
};
about().catch((error) => say(error.message, true));
