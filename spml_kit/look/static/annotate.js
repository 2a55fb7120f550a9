// What is seen: the picture, the marks, and those that wait for Python.
const make = (tag, attrs = {}, ...children) => {
  const el = document.createElement(tag)
  for (const [k, v] of Object.entries(attrs)) k in el && k != 'role' ? el[k] = v : el.setAttribute(k, v)
  el.append(...children); return el
}

function painter(canvas, get) {
  const pictures = {}, ctx = canvas.getContext('2d')
  const load = async key => { const data = get(key); pictures[key] = data.byteLength ? await createImageBitmap(new Blob([data])) : null }
  const paint = marks => {
    const [h, w] = get('size'), zoom = Math.min(4, 960/Math.max(h, w)), brush = get('brush'), px = 1/zoom, classes = get('palette')
    if (canvas.width != Math.round(w*zoom)) canvas.width = Math.round(w*zoom)
    if (canvas.height != Math.round(h*zoom)) canvas.height = Math.round(h*zoom)
    ctx.setTransform(zoom, 0, 0, zoom, 0, 0); ctx.clearRect(0, 0, w, h); ctx.lineCap = ctx.lineJoin = 'round'
    ctx.imageSmoothingEnabled = zoom < 1
    if (pictures.picture) ctx.drawImage(pictures.picture, 0, 0, w, h)
    if (get('preview') && pictures.spread) ctx.drawImage(pictures.spread, 0, 0, w, h)
    const cross = get('preview') && get('place').length ? get('place') : null
    const line = (path, width, colour) => { for (const [wide, ink] of [[width + 3*px, 'white'], [width, colour]]) { ctx.lineWidth = wide; ctx.strokeStyle = ink; ctx.stroke(path) } }
    for (const {kind, c, xy} of marks) {
      const path = new Path2D(), [[x, y], [u, v]] = [xy[0], xy.at(-1)], {colour, key} = classes[c]
      if (kind == 'boxes') { path.rect(Math.min(x, u), Math.min(y, v), Math.abs(u - x), Math.abs(v - y)); line(path, 2.5*px, colour) }
      else { path.arc(x + .5, y + .5, .01, 0, 7); for (const [a, b] of xy) path.lineTo(a + .5, b + .5); line(path, kind == 'points' ? 2*brush : brush, colour) }
      ctx.font = `bold ${13*px}px sans-serif`; ctx.lineWidth = 3*px; ctx.strokeStyle = 'white'; ctx.fillStyle = 'black'
      const at = [Math.min(w - 9*px, x + brush/2 + 3*px), Math.max(11*px, y - brush/2 - 2*px)]
      ctx.strokeText(key, ...at); ctx.fillText(key, ...at)
    }
    if (cross) { const p = new Path2D(), [x, y] = cross, r = 9*px; p.moveTo(x - r, y); p.lineTo(x + r, y); p.moveTo(x, y - r); p.lineTo(x, y + r); line(p, 2.5*px, 'black') } // a stroke helps most here
  }
  return {load, paint}
}

// The controls: tools, classes, undo, the images.
const TOOLS = [['scribbles', 's', '✎ stroke', 'draw a stroke through something'], ['points', 'p', '● dot', 'click on something'],
               ['boxes', 'b', '▭ box', 'draw a box around something; what lies outside all boxes is background'], ['erase', 'e', '⌫ erase', 'click on a mark to remove it']]

function controls(act, get, put) {
  const button = (text, help, run, more = {}) => make('button', {textContent: text, title: help, 'aria-label': help, onclick: run, type: 'button', ...more})
  const tools = TOOLS.map(([tool, key, text, help]) => button(text, `${help} (${key})`, () => put('tool', tool), {'data-tool': tool}))
  const undo = button('↶', 'undo (Ctrl+Z)', () => act({do: 'undo'}), {'data-do': 'undo'}), redo = button('↷', 'do again (Ctrl+Shift+Z)', () => act({do: 'redo'}), {'data-do': 'redo'})
  const brush = make('input', {type: 'range', min: 1, max: 25, step: 1, title: 'width of the brush in pixels, for all strokes of this image ([ and ])', 'aria-label': 'width of the brush in pixels'})
  const width = make('span', {className: 'width'})
  brush.onchange = () => put('brush', +brush.value)
  const preview = button('propagate', 'give every pixel the class of the most similar drawn pixels; pale where unsure: add a stroke there (v)', () => act({do: 'preview'}), {'data-do': 'preview'})
  const learning = get('learns') ? [button('doubt', 'show the doubt of the label map in red', () => put('doubtful', !get('doubtful')), {'data-do': 'doubt'}),
    button('accept', 'keep the label map of this image', () => act({do: 'accept'}), {'data-do': 'accept'}),
    button('next doubtful', 'open the most doubtful image that is not accepted', () => act({do: 'doubtful'}), {'data-do': 'doubtful'}),
    button('model', 'write model.spml: what the strokes taught, for other pictures', () => act({do: 'model'}), {'data-do': 'model'})] : []
  const step = (text, by, key) => button(text, `${by < 0 ? 'previous' : 'next'} image (${key})`, () => act({do: 'go', by}), {'data-do': by < 0 ? 'previous' : 'next'})
  const name = make('span', {className: 'name'})
  const choices = get('palette').map(({name, colour, key}, c) => [
    button(`${key} ${name}`, `draw ${name}${key ? ` (${key})` : ''}`, () => put('current', c), {'data-class': c, style: `border-left: 14px solid ${colour}`}),
    make('input', {type: 'checkbox', title: `tag: ${name} is in the image`, 'aria-label': `tag: ${name} is in the image`, 'data-tag': c, onchange: e => act({do: 'tag', c, on: e.target.checked})})])
  const classes = make('div', {className: 'bar', role: 'group', 'aria-label': 'classes'}, ...choices.map(pair => make('span', {className: 'class'}, ...pair)))
  const bar = make('div', {className: 'bar', role: 'toolbar', 'aria-label': 'tools'}, ...tools, undo, redo,
    make('label', {textContent: 'brush '}, brush, width), preview, ...learning, make('span', {className: 'walk'}, step('◀', -1, '←'), name, step('▶', 1, '→')))
  const update = marks => {
    tools.forEach((b, i) => b.setAttribute('aria-pressed', TOOLS[i][0] == get('tool')))
    preview.setAttribute('aria-pressed', get('preview')); learning[0]?.setAttribute('aria-pressed', get('doubtful')); get('can').forEach((can, i) => [undo, redo][i].setAttribute('aria-disabled', !can))
    brush.value = width.textContent = get('brush'); name.textContent = `${get('name')} (${get('index') + 1}/${get('count')})`
    const said = new Set(marks.map(m => m.c)), drawn = new Set(marks.filter(m => m.kind != 'tags').map(m => m.c))
    choices.forEach(([choose, tag], c) => { choose.setAttribute('aria-pressed', c == get('current')); tag.checked = said.has(c); tag.disabled = drawn.has(c) })
  }
  return {bar, classes, update}
}

// Pointer, keys and messages.
function render({model, el}) {
  const get = k => model.get(k), put = (k, v) => { model.set(k, v); model.save_changes() }
  const view = Math.random().toString(36).slice(2), waiting = []
  let sent = 0, live = null, planned = false
  const act = what => {
    if (what.do == 'preview') return put('preview', !get('preview'))
    waiting.push({...what, id: `${view}:${++sent}`}); model.send({...what, id: `${view}:${sent}`, index: get('index')}); refresh()
  }
  const canvas = make('canvas', {'aria-label': 'the image; draw here', role: 'img'}), status = make('div', {className: 'status', role: 'status', 'aria-live': 'polite'})
  const {load, paint} = painter(canvas, get), {bar, classes, update} = controls(act, get, put)
  const root = make('div', {className: 'spml-annotate', tabIndex: 0, 'data-lm-suppress-shortcuts': 'true', 'aria-label': 'annotator'}, bar, classes, canvas, status)
  const marks = () => [...get('marks'), ...waiting.filter(w => w.do == 'add').map(w => w.mark), ...(live ? [live] : [])]
  const redraw = () => { if (!planned) { planned = true; requestAnimationFrame(() => { planned = false; paint(marks().filter(m => m.kind != 'tags')) }) } }
  const refresh = () => {
    update(get('marks')); redraw()
    status.textContent = (waiting.length ? `waiting for Python: ${waiting.length} — ` : '') + get('status')
    status.classList.toggle('failed', get('failed'))
    root.dataset.waiting = waiting.length
  }
  const clamp = (v, most) => Math.round(10*Math.min(Math.max(v, 0), most))/10
  const where = (e, box) => {
    const r = canvas.getBoundingClientRect(), [h, w] = get('size'), x = (e.clientX - r.left)/r.width*w, y = (e.clientY - r.top)/r.height*h
    return box ? [Math.round(clamp(x, w)), Math.round(clamp(y, h))] : [clamp(x - .5, w - 1), clamp(y - .5, h - 1)]
  }
  canvas.onpointerdown = e => {
    root.focus({preventScroll: true})
    if (e.button || !e.isPrimary || get('failed') || waiting.some(w => w.do == 'go' || w.do == 'doubtful')) return
    e.preventDefault(); canvas.setPointerCapture(e.pointerId)
    const kind = get('tool')
    if (kind == 'erase') return act({do: 'erase', xy: where(e)})
    live = {kind, c: get('current'), xy: [where(e, kind == 'boxes')]}; redraw()
  }
  canvas.onpointermove = e => {
    if (!live || !e.isPrimary) return
    const events = e.getCoalescedEvents ? e.getCoalescedEvents() : []
    for (const o of events.length ? events : [e]) {
      const p = where(o, live.kind == 'boxes'), [x, y] = live.xy.at(-1)
      if (live.kind != 'scribbles') live.xy = live.kind == 'boxes' ? [live.xy[0], p] : [p]
      else if (Math.hypot(p[0] - x, p[1] - y) >= .7) live.xy.push(p)
    }
    redraw()
  }
  canvas.onpointerup = () => {
    const mark = live; live = null
    if (mark && (mark.kind != 'boxes' || mark.xy.length > 1 && mark.xy[0].every((v, i) => v != mark.xy[1][i]))) act({do: 'add', mark}); else redraw()
  }
  canvas.onpointercancel = () => { live = null; redraw() }
  root.onkeydown = e => {
    const key = e.key.length > 1 ? e.key : e.key.toLowerCase(), ctrl = e.ctrlKey || e.metaKey, c = get('palette').findIndex(o => o.key == key)
    const tool = TOOLS.find(t => t[1] == key), step = {ArrowLeft: -1, ArrowRight: 1}[key]
    if (ctrl && key == 'z') act({do: e.shiftKey ? 'redo' : 'undo'})
    else if (ctrl && key == 'y') act({do: 'redo'})
    else if (ctrl || e.altKey || step && e.target.type == 'range') return
    else if (step) act({do: 'go', by: step})
    else if (key == 'Escape') { live = null; redraw() }
    else if (key == 'v') act({do: 'preview'})
    else if (key == '[' || key == ']') put('brush', Math.min(25, Math.max(1, get('brush') + (key == ']' ? 1 : -1))))
    else if (tool) put('tool', tool[0])
    else if (c >= 0) put('current', c)
    else return
    e.preventDefault(); e.stopPropagation()
  }
  const fetch = key => load(key).then(redraw)
  model.on('change', refresh); model.on('change:picture', () => fetch('picture')); model.on('change:spread', () => fetch('spread'))
  model.on('change:done', () => { const at = waiting.findIndex(w => w.id == get('done')); waiting.splice(0, at + 1); refresh() })
  el.append(root); fetch('picture'); fetch('spread'); refresh()
}
export default {render}
