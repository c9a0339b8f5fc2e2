"use strict";
// Shared helpers. Tokens reach the page only through textContent, or through escaped() where
// plotly would read a subset of HTML.
const LS = {};

LS.escaped = (text) =>
  String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

LS.element = (tag, className, text) => {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined && text !== null) node.textContent = text;
  return node;
};

LS.sentence = (text) => LS.element("p", "absent", text);

LS.number = (value, digits = 3) => {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size !== 0 && size < 1e-3) return value.toExponential(digits - 1);
  if (size >= 1e3) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(digits)));
};

LS.percent = (p) => {
  if (p === null || p === undefined) return "–";
  if (p === 0) return "0%";
  if (p < 1e-4) return p.toExponential(1);
  return (100 * p).toPrecision(p < 0.1 ? 2 : 3).replace(/\.0+$/, "") + "%";
};

LS.short = (text) => (text.length > 18 ? text.slice(0, 17) + "…" : text);

LS.css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// cividis, nine stops: ordered in lightness for every kind of colour vision.
LS.scale = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#fee838"];
LS.rgb = (t) => {
  const at = Math.min(Math.max(t, 0), 1) * (LS.scale.length - 1);
  const low = Math.min(Math.floor(at), LS.scale.length - 2);
  const parts = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  const a = parts(LS.scale[low]);
  const b = parts(LS.scale[low + 1]);
  return a.map((value, i) => Math.round(value + (b[i] - value) * (at - low)));
};
// Relative luminance decides between dark and light ink (contrast of at least 4.5 on every stop).
LS.ink = (rgb) => {
  const [r, g, b] = rgb.map((v) => (v / 255 <= 0.03928 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff";
};
