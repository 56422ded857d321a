"use strict";
// One recording at a time, a file or the microphone: its words are shown, played and saved here.
// What is spoken is told as it is recognised, and transcribed as a whole when the speaker stops.

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
// The microphone: 16-bit samples over the realtime websocket, a fifth of a second at a time.
const BATCH_S = 0.2;
let microphone = null;

async function listen() {
  const stream = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1 } });
  const context = new AudioContext();
  await context.audioWorklet.addModule("/page/worklet.js");
  const node = new AudioWorkletNode(context, "samples");
  const key = $("key").value.trim();
  const protocols = ["realtime", ...(key ? [`openai-insecure-api-key.${key}`] : [])];
  const address = location.href.replace(/^http/, "ws").replace(/[^/]*$/, "v1/realtime");
  const socket = new WebSocket(address, protocols);
  const heard = [];
  let waiting = [];
  let count = 0;
  socket.onopen = () => {
    const format = { type: "audio/pcm", rate: context.sampleRate };
    const audio = { input: { format, turn_detection: null } };
    const session = { type: "transcription", audio, include: ["words"] };
    socket.send(JSON.stringify({ type: "session.update", session }));
    context.createMediaStreamSource(stream).connect(node);
    say("Listening …");
  };
  socket.onmessage = ({ data }) => {
    const event = JSON.parse(data);
    if (event.type === "error") say(event.error.message, true);
    if (event.type === "transcript.partial") showPartial(event);
  };
  socket.onclose = () => {
    if (microphone?.socket === socket) stop("The connection was closed.");
  };
  node.port.onmessage = ({ data }) => {
    waiting.push(data);
    count += data.length;
    if (count < BATCH_S * context.sampleRate || socket.readyState !== WebSocket.OPEN) return;
    const samples = new Int16Array(count);
    let at = 0;
    for (const part of waiting) {
      for (const value of part) samples[at++] = Math.max(-1, Math.min(1, value)) * 32767;
    }
    waiting = [];
    count = 0;
    heard.push(samples);
    const bytes = new Uint8Array(samples.buffer);
    const audio = btoa(String.fromCharCode(...bytes));
    socket.send(JSON.stringify({ type: "input_audio_buffer.append", audio }));
  };
  microphone = { stream, context, socket, heard };
  $("microphone").setAttribute("aria-pressed", "true");
  $("microphone").textContent = "Stop";
}

function showPartial({ text, stable_text }) {
  const rest = document.createElement("span");
  rest.className = "partial";
  rest.textContent = text.slice(stable_text.length);
  $("words").replaceChildren(stable_text, rest);
  $("result").hidden = false;
}

function stop(reason) {
  const { stream, context, socket, heard } = microphone;
  microphone = null;
  for (const track of stream.getTracks()) track.stop();
  socket.close();
  context.close();
  $("microphone").setAttribute("aria-pressed", "false");
  $("microphone").textContent = "Speak";
  if (reason) say(reason, true);
  if (heard.length) transcribe(new File([wav(heard, context.sampleRate)], "spoken.wav"));
}

function wav(parts, rate) {
  const size = 2 * parts.reduce((sum, part) => sum + part.length, 0);
  const header = new DataView(new ArrayBuffer(44));
  const text = (at, value) => [...value].forEach((c, i) => header.setUint8(at + i, c.charCodeAt(0)));
  text(0, "RIFF");
  header.setUint32(4, 36 + size, true);
  text(8, "WAVEfmt ");
  header.setUint32(16, 16, true);
  header.setUint16(20, 1, true);
  header.setUint16(22, 1, true);
  header.setUint32(24, rate, true);
  header.setUint32(28, 2 * rate, true);
  header.setUint16(32, 2, true);
  header.setUint16(34, 16, true);
  text(36, "data");
  header.setUint32(40, size, true);
  return new Blob([header, ...parts], { type: "audio/wav" });
}

$("microphone").onclick = () => {
  if (microphone) stop();
  else listen().catch((error) => say(`The microphone cannot be used: ${error.message}`, true));
};
about().catch((error) => say(error.message, true));
