function render({ model, el }) {
  const box = document.createElement("figure"), words = document.createElement("figcaption"), img = document.createElement("img");
  box.className = "spml-picture"; img.tabIndex = 0; img.draggable = false;
  img.setAttribute("data-lm-suppress-shortcuts", "true"); // JupyterLab leaves the arrow keys to us
  box.append(words, img); el.append(box);
  const clamp = (v, n) => Math.min(n - 1, Math.max(0, Math.floor(v)));
  const size = () => [img.naturalWidth, img.naturalHeight];
  const at = e => {
    const r = img.getBoundingClientRect(), [w, h] = size();
    return [clamp((e.clientX - r.left)/r.width*w, w), clamp((e.clientY - r.top)/r.height*h, h)];
  };
  const send = (name, value) => { model.set(name, value); model.save_changes(); };
  const draw = () => {
    const old = img.src;
    img.src = URL.createObjectURL(new Blob([model.get("png")], { type: "image/png" }));
    if (old) URL.revokeObjectURL(old);
  };
  const tell = () => {
    words.textContent = img.alt = model.get("caption"); img.title = model.get("help"); box.style.width = model.get("width") + "px";
  };
  const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  img.addEventListener("click", e => { img.focus({ preventScroll: true }); send("point", at(e)); });
  img.addEventListener("keydown", e => {
    if (!(e.key in arrows)) return;
    e.preventDefault(); e.stopPropagation();
    const n = e.shiftKey ? 8 : 1, old = model.get("point");
    send("point", size().map((s, k) => clamp((old.length ? old[k] : s/2) + n*arrows[e.key][k], s)));
  });
  img.addEventListener("pointermove", e => { if (model.get("follow")) send("hover", at(e)); });
  img.addEventListener("pointerleave", () => { if (model.get("follow")) send("hover", []); });
  model.on("change:png", draw); model.on("change:caption change:help change:width", tell);
  draw(); tell();
}
export default { render };
