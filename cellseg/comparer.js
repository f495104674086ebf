// The browser's half of `FieldComparer` (nbs/41_widgets.ipynb). Python sends grey levels and label codes, one byte a pixel, compressed;
// this file puts them together: contrast, colours, outlines, opacity, pan and zoom need no answer from Python.
// Names and notes only ever become textContent, values or canvas text, never markup. Nothing is fetched.

const MOST_FIELDS = 8 // fields whose overviews are kept
const OVERVIEW = 1024 // longest side of an overview, pixels
const MOST_PIXELS = 40e6 // of all pictures kept

// ---- small helpers -------------------------------------------------------------------------------------------------
function make(tag, props = {}, ...children) {
  const e = document.createElement(tag)
  for (const [k, v] of Object.entries(props)) {
    if (k === 'class') e.className = v
    else if (k.startsWith('on')) e.addEventListener(k.slice(2), v)
    else if (k === 'text') e.textContent = v
    else if (k.includes('-') || k === 'role') e.setAttribute(k, v)
    else e[k] = v
  }
  e.append(...children)
  return e
}
const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16))
const clamp = (v, lo, hi) => Math.min(Math.max(v, lo), hi)
const abgr = (r, g, b, a = 255) => ((a << 24) | (b << 16) | (g << 8) | r) >>> 0 // a pixel of ImageData as one number

async function inflate(data) {
  const stream = new Blob([data]).stream().pipeThrough(new DecompressionStream('deflate'))
  return new Uint8Array(await new Response(stream).arrayBuffer())
}

// ---- from bytes to pictures ----------------------------------------------------------------------------------------
// A part of a layer: {data, h, w, row, col, factor}: pixel (i,j) of it covers `factor` image pixels from (row+i*factor, col+j*factor)
function picture(part, paint) {
  const c = make('canvas', { width: part.w, height: part.h }), ctx = c.getContext('2d'), img = ctx.createImageData(part.w, part.h)
  paint(new Uint32Array(img.data.buffer))
  ctx.putImageData(img, 0, 0)
  return c
}
// 256 brightnesses from 0 to 1: `values` are the grey values of the levels
const stretch = (values, [low, high]) => values.map((v) => clamp((v - low) / Math.max(high - low, 1e-9), 0, 1))

function greyPicture(part, bright) {
  const lut = Uint32Array.from(bright, (b) => { const v = Math.round(255 * b); return abgr(v, v, v) })
  return picture(part, (out) => { for (let i = 0, d = part.data; i < out.length; i++) out[i] = lut[d[i]] })
}
function stainPicture(parts, brights, colours) { // stains in the colours of their classes, added
  const luts = brights.map((b, k) => [0, 1, 2].map((c) => Float32Array.from(b, (v) => v ** 0.7 * colours[k][c])))
  return picture(parts[0], (out) => {
    for (let i = 0; i < out.length; i++) {
      let r = 0, g = 0, b = 0
      for (let k = 0; k < parts.length; k++) { const v = parts[k].data[i], l = luts[k]; r += l[0][v]; g += l[1][v]; b += l[2][v] }
      out[i] = abgr(r > 255 ? 255 : r, g > 255 ? 255 : g, b > 255 ? 255 : b)
    }
  })
}
function coloured(part, code, lut, k) { // each pixel's code through a table of 256 colours: filled (k=0), or only within k pixels of another code
  const { w, h } = part, n = w * h, kw = k * w
  return picture(part, (out) => {
    if (!k) { for (let i = 0; i < n; i++) out[i] = lut[code[i]]; return }
    for (let y = 0, i = 0; y < h; y++) for (let x = 0; x < w; x++, i++) {
      const v = code[i]
      if (lut[v] && ((x >= k && code[i - k] !== v) || (x < w - k && code[i + k] !== v) || (y >= k && code[i - kw] !== v) || (y < h - k && code[i + kw] !== v))) out[i] = lut[v]
    }
  })
}
const MISSED = 1, INVENTED = 2, WRONG = 3
function mistakes(truth, pred, on) { // 0 right or not known; a class that is switched off is left out
  const out = new Uint8Array(truth.length)
  for (let i = 0; i < out.length; i++) {
    const t = truth[i], p = pred[i]
    if (t === p || t === 255 || p === 255 || !((t && on[t]) || (p && on[p]))) continue
    out[i] = p === 0 ? MISSED : t === 0 ? INVENTED : WRONG
  }
  return out
}

// ---- the widget ----------------------------------------------------------------------------------------------------
function render({ model, el }) {
  const get = (k) => model.get(k), set = (k, v) => { model.set(k, v); model.save_changes() }
  const config = get('config') // what never changes: names, classes, colours, layers
  const me = Math.random().toString(36).slice(2)
  const fields = new Map() // field → {layers: layer → {overview, detail, levels, low, high, message}, asked: layer → what was asked last}
  const pictures = new Map() // key → canvas
  let version = 0, view = null, drawn = false, blinkOn = false, timer = null, busy = false, gone = false, dragging = null, place = null

  // -- what is shown
  const layersOf = { fluorescence: config.stains, truth: ['truth'] }
  const channelsOf = (panel) => panel in config.greys ? [config.greys[panel]] : panel === 'fluorescence' ? config.stains : []
  function labelsOf(panel) {
    if (panel === 'truth') return ['truth']
    if (panel.startsWith('prediction')) return [panel]
    if (panel.startsWith('difference')) return ['truth', panel.replace('difference', 'prediction')]
    return []
  }
  const baseOf = (panel) => labelsOf(panel).length ? (get('base') === 'nothing' ? [] : channelsOf(get('base'))) : channelsOf(panel)
  const needs = (panel) => [...baseOf(panel), ...labelsOf(panel)]
  const shownPanels = () => (get('mode') === 'panels' ? get('panels') : get('pair')).filter((p) => config.panels.includes(p))
  const needed = () => [...new Set(shownPanels().flatMap(needs))]
  const shape = () => fields.get(get('field'))?.shape || (get('info').field === get('field') ? get('info').shape : null)

  // -- asking Python for pixels
  function entry(f) {
    if (fields.has(f)) { const e = fields.get(f); fields.delete(f); fields.set(f, e); return e }
    const e = { layers: {}, asked: {} }
    fields.set(f, e)
    while (fields.size > MOST_FIELDS) fields.delete(fields.keys().next().value)
    return e
  }
  const ask = (wants) => { if (wants.length) { busy = true; model.send({ kind: 'pixels', view: me, wants }) } }
  function askOverviews(f) {
    const e = entry(f)
    const wants = needed().filter((l) => !e.layers[l] && !e.asked[l]).map((layer) => ({ field: f, layer, most: OVERVIEW }))
    for (const w of wants) e.asked[w.layer] = 'overview'
    ask(wants)
  }
  function visible() { // rows and columns of the image that a panel shows
    const [h, w] = shape(), { pw, ph } = grid(), z = view.zoom
    return { rows: [clamp(view.row - ph / 2 / z, 0, h), clamp(view.row + ph / 2 / z, 0, h)], cols: [clamp(view.col - pw / 2 / z, 0, w), clamp(view.col + pw / 2 / z, 0, w)] }
  }
  let detailTimer = null
  function askDetail() {
    clearTimeout(detailTimer)
    detailTimer = setTimeout(() => {
      if (gone || !shape() || !view) return
      const f = get('field'), e = entry(f), v = visible(), dpr = window.devicePixelRatio || 1
      const factor = 2 ** Math.max(0, Math.floor(Math.log2(1 / (view.zoom * dpr)))), wants = []
      for (const layer of needed()) {
        const l = e.layers[layer]
        if (!l || !l.overview || factor >= l.overview.factor) continue
        const d = l.detail
        if (d && d.factor === factor && covers(d, v)) continue
        const grow = ([a, b], most) => { const m = 0.25 * (b - a); return [clamp(Math.floor((a - m) / 64) * 64, 0, most), clamp(Math.ceil((b + m) / 64) * 64, 0, most)] }
        const want = { field: f, layer, factor, rows: grow(v.rows, shape()[0]), cols: grow(v.cols, shape()[1]) }, key = JSON.stringify(want)
        if (e.asked[layer] === key) continue
        e.asked[layer] = key; wants.push(want)
      }
      ask(wants)
    }, 60)
  }
  const covers = (p, v) => p.row <= v.rows[0] && p.col <= v.cols[0] && p.row + p.h * p.factor >= v.rows[1] && p.col + p.w * p.factor >= v.cols[1]

  // A notebook that is opened again may show a widget whose kernel is gone. Until an answer comes, the picture above stands for it
  function live() {
    if (!root.classList.contains('cfc-waiting')) return
    root.classList.remove('cfc-waiting'); silent.remove(); clearTimeout(silence)
    hidePicture(el, get('_picture')); draw()
  }
  async function onMessage(m, buffers) {
    if (m.view !== me) return
    live()
    if (m.kind === 'scored') { busy = false; idle(); return }
    if (m.kind !== 'pixels') return
    const e = entry(m.field)
    if (m.message) e.layers[m.layer] = { message: m.message }
    else {
      const b = buffers[0], data = await inflate(b.buffer ? new Uint8Array(b.buffer, b.byteOffset, b.byteLength) : b)
      if (gone) return
      const part = { data, h: m.h, w: m.w, row: m.row, col: m.col, factor: m.factor, key: ++version }
      const l = e.layers[m.layer] = e.layers[m.layer] || {}
      e.shape = m.shape
      if (m.values) Object.assign(l, { values: m.values, low: m.low, high: m.high })
      if (m.overview) l.overview = part
      else if (m.field === get('field')) l.detail = part
      else delete e.asked[m.layer]
    }
    if (m.last) { busy = false; idle() }
    if (m.field === get('field')) { draw(); if (!needed().some((x) => !e.layers[x])) { contrastControls(); askDetail() } }
  }
  function idle() { // nothing to do: score the field shown, fetch its neighbours in the list, then score the others
    setTimeout(() => {
      if (gone || busy) return
      const i = order.indexOf(get('field')), more = () => { busy = true; model.send({ kind: 'score', view: me }) }
      if (!get('scored') && config.predictions.some((p) => !get('dice')[p]?.[get('field')])) return more()
      for (const f of [order[i + 1], order[i - 1]]) {
        if (f === undefined) continue
        const e = entry(f), lacks = needed().filter((l) => !e.layers[l] && !e.asked[l])
        if (lacks.length) { askOverviews(f); entry(get('field')); return }
      }
      if (!get('scored')) more()
    }, 120)
  }

  // -- from layers to the screen
  function cached(key, build) {
    let c = pictures.get(key)
    if (c) pictures.delete(key)
    else c = build()
    pictures.set(key, c)
    let total = 0
    for (const p of pictures.values()) total += p.width * p.height
    for (const [k, p] of pictures) { if (total <= MOST_PIXELS || k === key) break; total -= p.width * p.height; pictures.delete(k) }
    return c
  }
  const limits = (ch, l) => get('contrast')[ch] || [l.low, l.high]
  function basePicture(e, chans, which) {
    const have = chans.filter((c) => e.layers[c]?.[which] && (!config.stains.includes(c) || get('stains').includes(c)))
    if (!have.length) return null
    const ls = have.map((c) => e.layers[c]), parts = ls.map((l) => l[which]), stain = chans === config.stains
    if (parts.some((p) => p.w !== parts[0].w || p.h !== parts[0].h || p.row !== parts[0].row || p.col !== parts[0].col)) return null
    const lims = have.map((c, k) => limits(c, ls[k]))
    const canvas = cached(JSON.stringify(['base', stain, parts.map((p) => p.key), lims]), () => {
      const brights = ls.map((l, k) => stretch(l.values, lims[k]))
      return stain ? stainPicture(parts, brights, have.map((c) => rgb(config.stain_colours[c]))) : greyPicture(parts[0], brights[0])
    })
    return { canvas, part: parts[0] }
  }
  function overlayPicture(e, panel, which) {
    const names = labelsOf(panel), parts = names.map((n) => e.layers[n]?.[which])
    if (!names.length || parts.some((p) => !p)) return null
    if (parts.length === 2 && (parts[0].row !== parts[1].row || parts[0].col !== parts[1].col || parts[0].w !== parts[1].w || parts[0].h !== parts[1].h)) return null
    const on = config.classes.map((c) => get('shown').includes(c))
    const outline = get('outline') ? clamp(Math.round(1.5 / (view.zoom * parts[0].factor)), 1, 4) : 0 // about as wide on any screen
    const canvas = cached(JSON.stringify(['label', parts.map((p) => p.key), on, outline]), () => {
      const lut = new Uint32Array(256)
      if (parts.length === 2) {
        ;[MISSED, INVENTED, WRONG].forEach((k, i) => { lut[k] = abgr(...rgb(Object.values(config.mistakes)[i])) })
        return coloured(parts[0], mistakes(parts[0].data, parts[1].data, on), lut, outline)
      }
      config.classes.forEach((c, k) => { if (k && on[k]) lut[k] = abgr(...rgb(config.colours[c])) })
      lut[255] = abgr(...rgb(config.colours.ignore))
      return coloured(parts[0], parts[0].data, lut, outline)
    })
    return { canvas, part: parts[0] }
  }
  function grid() { // how panels lie on the canvas, CSS pixels
    const W = Math.max(120, stage.clientWidth), most = get('height'), [h, w] = shape() || [3, 4]
    const n = get('mode') === 'panels' ? Math.max(1, shownPanels().length) : 1
    let best = null
    for (let cols = 1; cols <= n; cols++) {
      const rows = Math.ceil(n / cols), pw = Math.min((W - 3 * (cols - 1)) / cols, (most - 3 * (rows - 1)) / rows * w / h)
      if (!best || pw > best.fit) best = { cols, rows, fit: pw }
    }
    const pw = Math.floor((W - 3 * (best.cols - 1)) / best.cols), ph = Math.floor(best.fit * h / w)
    return { ...best, W, pw, ph, H: best.rows * ph + 3 * (best.rows - 1) }
  }
  const fitZoom = () => { const [h, w] = shape(), g = grid(); return Math.min(g.pw / w, g.ph / h) }
  const putLabels = (ctx, pic, g, x, y) => put(ctx, pic, g, x, y, get('outline') ? Math.min(1, 2 * get('opacity')) : get('opacity'), 1)
  function put(ctx, pic, g, x, y, alpha, smooth) { // smooth: up to so many screen pixels per pixel
    const { part, canvas: c } = pic, z = view.zoom
    ctx.globalAlpha = alpha
    ctx.imageSmoothingEnabled = z * part.factor < smooth; ctx.imageSmoothingQuality = 'medium'
    const x0 = x + g.pw / 2 + (part.col - view.col) * z, y0 = y + g.ph / 2 + (part.row - view.row) * z
    const [h, w] = shape() // the last pixel of a reduced part may stand for fewer image pixels
    const iw = Math.min(part.w * part.factor, w - part.col), ih = Math.min(part.h * part.factor, h - part.row)
    ctx.drawImage(c, 0, 0, iw / part.factor, ih / part.factor, x0, y0, iw * z, ih * z)
    ctx.globalAlpha = 1
  }
  function drawPanel(ctx, panel, g, x, y, from = 0) { // from: left edge of what is drawn, as a share of the panel
    const e = entry(get('field'))
    ctx.save()
    ctx.beginPath(); ctx.rect(x + from * g.pw, y, g.pw * (1 - from), g.ph); ctx.clip()
    ctx.fillStyle = '#1b1b1b'; ctx.fillRect(x, y, g.pw, g.ph)
    if (view) for (const which of ['overview', 'detail']) {
      const base = basePicture(e, baseOf(panel), which), over = overlayPicture(e, panel, which)
      if (base) put(ctx, base, g, x, y, 1, 4)
      // a detail replaces the overview beneath it, also where its labels are transparent
      if (over && (which === 'detail' || !detailed(e, panel))) putLabels(ctx, over, g, x, y)
      else if (over) { const d = e.layers[labelsOf(panel)[0]].detail; around(ctx, d, g, x, y, () => putLabels(ctx, over, g, x, y)) }
    }
    if (place && view) cross(ctx, g, x, y)
    ctx.restore()
  }
  const detailed = (e, panel) => overlayPicture(e, panel, 'detail') !== null
  function around(ctx, d, g, x, y, f) { // draw only outside of the part `d`
    const z = view.zoom
    ctx.save(); ctx.beginPath(); ctx.rect(x, y, g.pw, g.ph)
    ctx.rect(x + g.pw / 2 + (d.col - view.col) * z, y + g.ph / 2 + (d.row - view.row) * z, d.w * d.factor * z, d.h * d.factor * z)
    ctx.clip('evenodd'); f(); ctx.restore()
  }
  function cross(ctx, g, x, y) {
    const cx = x + g.pw / 2 + (place.col + 0.5 - view.col) * view.zoom, cy = y + g.ph / 2 + (place.row + 0.5 - view.row) * view.zoom
    for (const [style, width] of [['#000', 3], ['#fff', 1.2]]) {
      ctx.strokeStyle = style; ctx.lineWidth = width; ctx.beginPath()
      for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) { ctx.moveTo(cx + 4 * dx, cy + 4 * dy); ctx.lineTo(cx + 11 * dx, cy + 11 * dy) }
      ctx.stroke()
    }
  }
  function scaleBar(ctx, g) {
    const px = get('info').pixel_size
    if (!px || !view) return
    const um = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000].filter((u) => u / px * view.zoom < Math.min(g.pw / 3, 160)).pop()
    if (!um) return
    const len = um / px * view.zoom, x = g.pw - 10 - len, y = g.ph - 10, text = `${um} µm`
    ctx.font = '11px sans-serif'
    const tw = ctx.measureText(text).width, bw = Math.max(len, tw) + 10
    ctx.fillStyle = 'rgba(0,0,0,.6)'; ctx.fillRect(g.pw - 10 - bw + 5, y - 18, bw, 25)
    ctx.fillStyle = '#fff'; ctx.fillRect(x, y, len, 3); ctx.textAlign = 'center'; ctx.fillText(text, x + len / 2, y - 5)
  }
  let frame = null
  function draw() { if (frame === null) frame = requestAnimationFrame(() => { frame = null; if (!gone) drawNow() }) }
  function drawNow() {
    const t0 = performance.now(), e = entry(get('field')), g = grid(), dpr = window.devicePixelRatio || 1
    if (shape()) takeView(g)
    if (canvas.width !== Math.round(g.W * dpr) || canvas.height !== Math.round(g.H * dpr)) { canvas.width = Math.round(g.W * dpr); canvas.height = Math.round(g.H * dpr) }
    stage.style.height = `${g.H}px`
    const ctx = canvas.getContext('2d'), ps = shownPanels(), mode = get('mode')
    ctx.setTransform(dpr, 0, 0, dpr, 0, 0); ctx.clearRect(0, 0, g.W, g.H)
    const boxes = [] // panel and where its caption stands
    if (mode === 'panels') ps.forEach((p, i) => {
      const x = (i % g.cols) * (g.pw + 3), y = Math.floor(i / g.cols) * (g.ph + 3)
      drawPanel(ctx, p, g, x, y); boxes.push([p, x, y])
    })
    else if (mode === 'curtain' && ps.length) {
      drawPanel(ctx, ps[0], g, 0, 0); drawPanel(ctx, ps[1] || ps[0], g, 0, 0, get('curtain'))
      const x = get('curtain') * g.pw
      ctx.fillStyle = '#000'; ctx.fillRect(x - 2, 0, 4, g.ph); ctx.fillStyle = '#fff'; ctx.fillRect(x - 1, 0, 2, g.ph)
      boxes.push([ps[0], 0, 0], [ps[1] || ps[0], -1, 0])
    } else if (ps.length) { const p = ps[blinkOn ? 1 : 0] || ps[0]; drawPanel(ctx, p, g, 0, 0); boxes.push([p, 0, 0]) }
    scaleBar(ctx, g)
    captions(boxes, g, e)
    const ready = needed().every((l) => e.layers[l])
    const v = view && shape() && visible()
    root.dataset.field = get('field'); root.dataset.ready = ready ? '1' : '0'; root.dataset.shows = boxes.map((b) => b[0]).join('|')
    root.dataset.panel = [g.pw, g.ph, g.cols].join(' '); root.dataset.zoom = view ? view.zoom : ''; root.dataset.draws = 1 + Number(root.dataset.draws || 0)
    root.dataset.detail = v && needed().every((l) => e.layers[l]?.detail && covers(e.layers[l].detail, v)) ? e.layers[needed()[0]].detail.factor : ''
    root.dataset.ms = (performance.now() - t0).toFixed(1)
  }
  function captions(boxes, g, e) {
    const kids = []
    for (const [panel, x, y] of boxes) {
      const cap = make('div', { class: 'cfc-caption', text: panel })
      if (x < 0) cap.style.right = '4px'
      else cap.style.left = `${x + 4}px`
      cap.style.top = `${y + 4}px`
      kids.push(cap)
      const said = needs(panel).map((l) => e.layers[l]?.message).filter(Boolean), lacks = needs(panel).some((l) => !e.layers[l])
      if (said.length || lacks) {
        const box = make('div', { class: said.length ? 'cfc-message' : 'cfc-message cfc-wait', text: said.length ? [...new Set(said)].join('\n') : 'loading …' })
        box.style.left = `${Math.max(x, 0) + 8}px`; box.style.top = `${y + 30}px`; box.style.width = `${g.pw - 16}px`; box.style.maxHeight = `${Math.max(g.ph - 40, 20)}px`
        kids.push(box)
      }
    }
    over.replaceChildren(...kids)
  }
  function takeView() { // the view from Python, or the whole field
    const v = get('view'), [h, w] = shape()
    view = v.zoom > 0 ? { row: v.row, col: v.col, zoom: v.zoom } : { row: h / 2, col: w / 2, zoom: fitZoom() }
  }
  let viewTimer = null
  function moveView(v) {
    if (!shape()) return
    const [h, w] = shape(), fit = fitZoom()
    if (v.zoom <= fit * 1.001) v = { row: h / 2, col: w / 2, zoom: 0 }
    else v = { zoom: Math.min(v.zoom, 64), row: clamp(v.row, 0, h), col: clamp(v.col, 0, w) }
    model.set('view', v) // sent to Python when the movement pauses
    clearTimeout(viewTimer); viewTimer = setTimeout(() => model.save_changes(), 150)
    draw(); askDetail()
  }
  function zoomAt(factor, px, py) { // keep the image place under the panel's pixel (px,py)
    if (!shape() || !view) return
    const g = grid(), fit = fitZoom(), z = clamp(view.zoom * factor, fit, 64)
    const row = view.row + (py - g.ph / 2) / view.zoom, col = view.col + (px - g.pw / 2) / view.zoom
    moveView({ zoom: z, row: row - (py - g.ph / 2) / z, col: col - (px - g.pw / 2) / z })
  }

  // -- order of the fields
  let order = []
  function mean(scores) { const s = (scores || []).filter((d) => d !== null); return s.length ? s.reduce((a, b) => a + b) / s.length : null }
  function scoreOf(f) {
    const s = get('dice')[get('prediction')]?.[f], by = get('order'), k = config.classes.indexOf(by)
    return s ? (k >= 0 ? s[k] : mean(s)) : null
  }
  function sortFields() {
    order = config.names.map((_, i) => i)
    if (get('order') !== 'table') order.sort((a, b) => (scoreOf(a) ?? 2) - (scoreOf(b) ?? 2) || a - b)
  }
  const MARKS = { accept: '✓', exclude: '✗' }
  function listFields() {
    sortFields()
    picker.replaceChildren(...order.map((f) => {
      const s = scoreOf(f), [verdict, note] = get('verdicts')[f] || [null, null]
      return make('option', { value: f, text: [s === null ? '–' : s.toFixed(3), config.names[f], MARKS[verdict] || verdict || '', note ? '✎' : ''].filter(Boolean).join('  ') })
    }))
    picker.value = get('field')
  }
  function step(by) {
    const i = order.indexOf(get('field')) + by
    if (i >= 0 && i < order.length) go(order[i])
  }
  function go(f) { saveNote(); set('field', f) }

  // -- controls
  const button = (text, title, onclick, cls = '') => make('button', { text, title, onclick, class: cls, type: 'button' })
  const select = (options, onchange, title) => make('select', { title, onchange: (ev) => onchange(ev.target.value) }, ...options.map(([value, text]) => make('option', { value, text })))
  const labelled = (text, ...els) => make('label', {}, make('span', { text }), ...els)
  const range = (min, max, stepBy, title, oninput) => make('input', { type: 'range', min, max, step: stepBy, title, oninput: (ev) => oninput(Number(ev.target.value)) })

  const picker = select([], (v) => { go(Number(v)); stage.focus({ preventScroll: true }) }, 'Field'); picker.className = 'cfc-picker'
  const orderSelect = select([['worst', 'worst first'], ...config.classes.map((c) => [c, `worst ${c} first`]), ['table', 'as in the table']], (v) => set('order', v), 'Order of the fields')
  const predSelect = select(config.predictions.map((p) => [p, p]), (v) => set('prediction', v), 'Prediction whose Dice orders the fields')
  const dice = make('div', { class: 'cfc-dice' })
  const accept = button('accept', 'Accept this field (key a)', () => judge('accept')), exclude = button('exclude', 'Exclude this field (key x)', () => judge('exclude'))
  const note = make('input', { type: 'text', class: 'cfc-note', placeholder: 'note', title: 'Note about this field', onchange: () => saveNote() })
  const modeSelect = select([['panels', 'side by side'], ['curtain', 'curtain'], ['blink', 'blink']], (v) => set('mode', v), 'Side by side, or two layers in one panel (key m)')
  const panelBoxes = make('span', { class: 'cfc-group' }), pairBoxes = make('span', { class: 'cfc-group' })
  const baseSelect = select([...Object.keys(config.greys), ...(config.stains.length ? ['fluorescence'] : []), 'nothing'].map((b) => [b, b]), (v) => set('base', v), 'What lies under labels')
  const opacity = range(0, 1, 0.05, 'Opacity of labels', (v) => set('opacity', v))
  const outline = make('input', { type: 'checkbox', title: 'Outlines instead of filled labels (key o)', onchange: (ev) => set('outline', ev.target.checked) })
  const classBoxes = make('span', { class: 'cfc-group' }), contrastBox = make('span', { class: 'cfc-row' })
  const canvas = make('canvas'), over = make('div', { class: 'cfc-over' })
  const stage = make('div', { class: 'cfc-stage', tabIndex: 0, role: 'application', 'aria-label': 'Panels: drag to move, wheel to zoom' }, canvas, over)
  const readout = make('div', { class: 'cfc-readout' }), status = make('div', { class: 'cfc-status', role: 'status' })
  const help = make('div', { class: 'cfc-help', text: 'Click into a panel: its values; then wheel or + − zoom, drag moves, 0 whole field, ← → field, space flicks, o outlines, m mode, a accept, x exclude' })
  const legend = make('span', { class: 'cfc-group' }, ...Object.entries(config.mistakes).map(([k, c]) => swatch(c, k.replace('_', ' '))))
  const curtain = range(0, 1, 0.01, 'Place of the curtain', (v) => set('curtain', v))
  const silent = make('div', { class: 'cfc-silent' }), silence = setTimeout(() => { silent.textContent = 'The widget gets no answer from Python yet. If the kernel is not busy, run this cell again.' }, 6000)
  const root = make('div', { class: 'cfc cfc-waiting', 'data-lm-suppress-shortcuts': 'true' },
    make('div', { class: 'cfc-row' }, button('◀', 'Previous field (key ←)', () => step(-1)), picker, button('▶', 'Next field (key →)', () => step(1)), orderSelect,
      ...(config.predictions.length > 1 ? [predSelect] : []), accept, exclude, note),
    dice,
    make('div', { class: 'cfc-row' }, modeSelect, panelBoxes, pairBoxes),
    make('div', { class: 'cfc-row' }, ...(config.labels ? [labelled('labels on', baseSelect), labelled('opacity', opacity), labelled('outlines', outline), classBoxes] : []), ...(config.panels.some((p) => p.startsWith('difference')) ? [legend] : [])),
    contrastBox, stage, readout, status, help)
  root.append(make('style', { text: STYLE }))
  el.append(silent, root)

  function swatch(colour, text) { const s = make('i', { class: 'cfc-swatch' }); s.style.background = colour; return make('span', { class: 'cfc-key' }, s, make('span', { text })) }
  function panelControls() {
    const panels = get('mode') === 'panels'
    panelBoxes.style.display = panels ? '' : 'none'; pairBoxes.style.display = panels ? 'none' : ''
    modeSelect.value = get('mode')
    if (panels) panelBoxes.replaceChildren(...config.panels.map((p) => make('label', {}, make('input', { type: 'checkbox', checked: get('panels').includes(p),
      onchange: (ev) => set('panels', config.panels.filter((q) => q === p ? ev.target.checked : get('panels').includes(q))) }), make('span', { text: p }))))
    else {
      const one = (k) => { const s = select(config.panels.map((p) => [p, p]), (v) => { const pair = [...get('pair')]; pair[k] = v; set('pair', pair) }, k ? 'Second layer' : 'First layer'); s.value = get('pair')[k]; return s }
      pairBoxes.replaceChildren(one(0), one(1), ...(get('mode') === 'curtain' ? [curtain] : []))
      curtain.value = get('curtain')
    }
    clearInterval(timer); timer = null
    if (get('mode') === 'blink' && get('blink') > 0) timer = setInterval(() => { blinkOn = !blinkOn; draw() }, get('blink'))
  }
  function labelControls() {
    baseSelect.value = get('base'); opacity.value = get('opacity'); outline.checked = get('outline')
    classBoxes.replaceChildren(...config.classes.slice(1).map((c) => make('label', {}, make('input', { type: 'checkbox', checked: get('shown').includes(c),
      onchange: (ev) => set('shown', config.classes.filter((d) => d === c ? ev.target.checked : get('shown').includes(d))) }), swatch(config.colours[c], c))))
  }
  let contrastFor = null
  function contrastControls() { // two sliders a channel; their places are levels, so that they are fine where the pixels are
    const e = entry(get('field')), chans = [...Object.values(config.greys), ...config.stains].filter((c) => e.layers[c]?.values)
    const key = JSON.stringify([get('field'), chans])
    if (contrastFor !== key) {
      contrastFor = key
      contrastBox.replaceChildren(...chans.map((c) => {
        const values = e.layers[c].values
        const lims = () => limits(c, e.layers[c])
        const sliders = [0, 1].map((k) => {
          const s = range(0, 255, 1, `${c}: grey value shown ${k ? 'white' : 'black'}`, (i) => { const l = [...lims()]; l[k] = values[i]; set('contrast', { ...get('contrast'), [c]: l }) })
          s.dataset.channel = c; s.dataset.end = k ? 'high' : 'low'
          return s
        })
        const text = make('span', { class: 'cfc-values' })
        const on = config.stains.includes(c) && make('input', { type: 'checkbox', title: `Show ${c}?`, onchange: (ev) => set('stains', config.stains.filter((d) => d === c ? ev.target.checked : get('stains').includes(d))) })
        const group = make('span', { class: 'cfc-group' }, make('label', {}, ...(on ? [on] : []), make('span', { text: c })), ...sliders, text, button('auto', `Contrast of ${c} by percentiles of each field`, () => { const all = { ...get('contrast') }; delete all[c]; set('contrast', all) }))
        group.refresh = () => {
          const l = lims()
          if (on) on.checked = get('stains').includes(c)
          sliders.forEach((s, k) => { s.value = values.reduce((b, v, i) => Math.abs(v - l[k]) < Math.abs(values[b] - l[k]) ? i : b, 0) })
          text.textContent = l.map((v) => Math.abs(v) < 10 ? v.toPrecision(3) : Math.round(v)).join(' – ')
        }
        return group
      }))
    }
    for (const g of contrastBox.children) g.refresh()
  }
  function showDice() {
    const f = get('field'), all = get('dice')
    dice.replaceChildren(...config.predictions.map((p) => {
      const s = all[p]?.[f]
      const line = make('span', { class: 'cfc-group' }, make('b', { text: config.predictions.length > 1 || p !== 'prediction' ? p : 'Dice' }))
      if (!s) line.append(make('span', { text: config.truth ? 'not scored' : 'no truth to score against' }))
      else config.classes.forEach((c, k) => line.append(swatch(config.colours[c], `${c} ${s[k] === null ? '–' : s[k].toFixed(3)}`)))
      return line
    }))
    const done = Object.keys(all[get('prediction')] || {}).length
    if (config.truth && config.predictions.length && !get('scored')) dice.append(make('span', { class: 'cfc-help', text: `${done} of ${config.names.length} scored so far` }))
  }
  function showVerdict() {
    const [verdict, text] = get('verdicts')[get('field')] || [null, null]
    accept.classList.toggle('cfc-on', verdict === 'accept'); exclude.classList.toggle('cfc-on', verdict === 'exclude')
    if (note.dataset.field !== String(get('field')) || document.activeElement !== note) note.value = note.dataset.saved = text || '' // not while it is written
    note.dataset.field = get('field'); showStatus()
  }
  function showStatus() { status.textContent = get('status'); status.classList.toggle('cfc-bad', !get('status').startsWith('saved')) }
  function judge(verdict) {
    const f = get('field'), [now] = get('verdicts')[f] || [null]
    saveNote()
    model.send({ kind: 'verdict', field: f, verdict: now === verdict ? null : verdict })
  }
  function saveNote() { // under the field it was written for
    if (note.dataset.field === undefined || note.value === note.dataset.saved) return
    note.dataset.saved = note.value
    model.send({ kind: 'verdict', field: Number(note.dataset.field), note: note.value })
  }
  function showPlace() {
    const p = get('place')
    place = p && p.field === get('field') ? p : null
    const line = (k, v) => make('span', { class: 'cfc-group' }, make('b', { text: k }), make('span', { text: v }))
    const num = (v) => Number.isInteger(v) ? String(v) : v.toPrecision(4)
    readout.replaceChildren(...(place ? [line('row, column', `${place.row}, ${place.col}`), ...Object.entries(place.values).map(([k, v]) => line(k, num(v))),
      ...Object.entries(place.classes).map(([k, v]) => line(k, place.cell[k] ? `cell ${place.cell[k]}, ${v}` : v)),
      ...Object.entries(place.probs).map(([k, v]) => line(`probability (${k})`, config.classes.map((c, i) => `${c} ${v[i].toFixed(2)}`).join(', '))), ...(place.problems || []).map((t) => line('!', t))] : []))
  }

  // -- mouse and keys
  function inPanel(ev) {
    const b = canvas.getBoundingClientRect(), g = grid(), x = ev.clientX - b.left, y = ev.clientY - b.top
    return { x: x % (g.pw + 3), y: y % (g.ph + 3), g, ax: x }
  }
  stage.addEventListener('wheel', (ev) => {
    if (!ev.ctrlKey && !root.contains(document.activeElement)) return // the page scrolls until the widget has been clicked
    ev.preventDefault()
    const p = inPanel(ev); zoomAt(Math.exp(-ev.deltaY * (ev.deltaMode ? 0.05 : 0.002)), p.x, p.y)
  }, { passive: false })
  stage.addEventListener('pointerdown', (ev) => {
    if (ev.button || !view || !shape()) return
    stage.focus({ preventScroll: true })
    const p = inPanel(ev), onCurtain = get('mode') === 'curtain' && Math.abs(p.ax - get('curtain') * p.g.pw) < 9
    dragging = { x: ev.clientX, y: ev.clientY, view: { ...view }, moved: false, onCurtain, p }
    stage.setPointerCapture(ev.pointerId)
  })
  stage.addEventListener('pointermove', (ev) => {
    if (!dragging) return
    const dx = ev.clientX - dragging.x, dy = ev.clientY - dragging.y
    if (Math.abs(dx) + Math.abs(dy) > 4) dragging.moved = true
    if (dragging.onCurtain) { model.set('curtain', clamp(inPanel(ev).ax / dragging.p.g.pw, 0, 1)); curtain.value = get('curtain'); draw() }
    else if (dragging.moved && dragging.view.zoom > fitZoom() * 1.001) moveView({ zoom: dragging.view.zoom, row: dragging.view.row - dy / dragging.view.zoom, col: dragging.view.col - dx / dragging.view.zoom })
  })
  stage.addEventListener('pointerup', () => {
    const d = dragging; dragging = null
    if (!d) return
    if (d.onCurtain) return model.save_changes()
    if (d.moved) return
    const row = Math.floor(view.row + (d.p.y - d.p.g.ph / 2) / view.zoom), col = Math.floor(view.col + (d.p.x - d.p.g.pw / 2) / view.zoom), [h, w] = shape()
    if (row >= 0 && col >= 0 && row < h && col < w) { place = { row, col, field: get('field'), values: {}, classes: {}, cell: {}, nucleus: {}, probs: {} }; draw(); model.send({ kind: 'pick', field: get('field'), row, col }) }
  })
  stage.addEventListener('pointercancel', () => { dragging = null })
  const MODES = ['panels', 'curtain', 'blink']
  const KEYS = { ArrowRight: () => step(1), ArrowLeft: () => step(-1), n: () => step(1), p: () => step(-1), o: () => set('outline', !get('outline')), a: () => judge('accept'), x: () => judge('exclude'),
    0: () => moveView({ zoom: 0 }), '+': () => zoomAt(1.5, grid().pw / 2, grid().ph / 2), '=': () => zoomAt(1.5, grid().pw / 2, grid().ph / 2), '-': () => zoomAt(1 / 1.5, grid().pw / 2, grid().ph / 2),
    m: () => set('mode', MODES[(MODES.indexOf(get('mode')) + 1) % 3]), ' ': () => { blinkOn = !blinkOn; if (get('mode') === 'panels') set('mode', 'blink'); clearInterval(timer); draw() } }
  root.addEventListener('keydown', (ev) => {
    ev.stopPropagation() // not also a shortcut of the notebook
    const t = ev.target, native = ev.key === ' ' || ev.key.startsWith('Arrow') // what a button, a box or a slider does by itself
    if (ev.ctrlKey || ev.metaKey || ev.altKey || t.tagName === 'SELECT' || t.type === 'text' || (native && (t.tagName === 'INPUT' || t.tagName === 'BUTTON'))) return
    const f = KEYS[ev.key]
    if (f) { ev.preventDefault(); f() }
  })

  // -- what changes, here or in Python
  const on = (names, f) => { for (const n of names.split(' ')) model.on(`change:${n}`, f) }
  const changed = () => { askOverviews(get('field')); draw(); askDetail() }
  on('field', () => {
    saveNote(); place = null
    for (const [f, e] of fields) if (f !== get('field')) for (const [l, o] of Object.entries(e.layers)) if (o.detail) { delete o.detail; e.asked[l] = 'overview' }
    picker.value = get('field'); showDice(); showVerdict(); showPlace(); changed(); contrastControls(); if (!busy) idle()
  })
  on('info', () => { draw(); askDetail() })
  on('mode panels pair blink', () => { panelControls(); changed() })
  on('base opacity outline shown', () => { labelControls(); changed() })
  on('contrast stains', () => { contrastControls(); draw() })
  on('view curtain height', () => { draw(); askDetail() })
  on('order prediction', () => { orderSelect.value = get('order'); predSelect.value = get('prediction'); listFields() })
  on('dice', () => { if (document.activeElement === picker) picker.onblur = () => { picker.onblur = null; listFields() }; else listFields(); showDice() }) // an open list stays as it is
  on('scored', () => showDice())
  on('verdicts', () => { listFields(); showVerdict() })
  on('status', showStatus)
  on('place', () => { showPlace(); draw() })
  model.on('msg:custom', onMessage)
  const watch = new ResizeObserver(() => draw())
  watch.observe(stage)
  orderSelect.value = get('order'); predSelect.value = get('prediction')
  listFields(); panelControls(); labelControls(); showDice(); showVerdict(); showPlace(); changed()
  model.send({ kind: 'hello', view: me })
  return () => { gone = true; watch.disconnect(); clearInterval(timer); clearTimeout(silence); clearTimeout(detailTimer); clearTimeout(viewTimer); model.off('msg:custom', onMessage); pictures.clear(); fields.clear() }
}

// JupyterLab: the output just above the widget is the picture that stands for it where there is no kernel
async function hidePicture(el, size) {
  const before = el.closest('.jp-OutputArea-child')?.previousElementSibling, imgs = before ? before.querySelectorAll('img') : []
  if (imgs.length !== 1 || !size.length) return
  await imgs[0].decode().catch(() => {})
  if (imgs[0].naturalWidth === size[0] && imgs[0].naturalHeight === size[1]) before.style.display = 'none'
}

const STYLE = `
.cfc { font: 12px/1.4 var(--jp-ui-font-family, sans-serif); color: var(--jp-ui-font-color1, #222); width: 100%; }
.cfc-waiting { visibility: hidden; height: 0; overflow: hidden; } .cfc-silent { font: 12px var(--jp-ui-font-family, sans-serif); color: var(--jp-ui-font-color2, #666); }
.cfc-row, .cfc-dice, .cfc-readout { display: flex; flex-wrap: wrap; gap: 4px 12px; align-items: center; padding: 2px 0; }
.cfc-group, .cfc label, .cfc-key { display: inline-flex; flex-wrap: wrap; gap: 4px; align-items: center; }
.cfc-group { gap: 2px 8px; }
.cfc button, .cfc select, .cfc input[type=text] { font: inherit; padding: 2px 8px; border: 1px solid var(--jp-border-color1, #bbb); border-radius: 3px; background: var(--jp-layout-color1, #fff); color: inherit; }
.cfc button.cfc-on { background: #0072B2; color: #fff; border-color: #0072B2; }
.cfc-picker { max-width: 22em; } .cfc-note { flex: 1 1 10em; max-width: 30em; }
.cfc input[type=range] { width: 76px; margin: 0; } .cfc input[type=checkbox] { margin: 0; }
.cfc-swatch { width: 10px; height: 10px; border: 1px solid #8888; display: inline-block; }
.cfc-values { min-width: 6.5em; font-variant-numeric: tabular-nums; }
.cfc-stage { position: relative; width: 100%; overflow: hidden; touch-action: none; cursor: crosshair; outline: none; user-select: none; }
.cfc-stage:focus-visible .cfc-over { box-shadow: inset 0 0 0 2px #0072B2; }
.cfc-stage canvas { width: 100%; height: 100%; display: block; }
.cfc-over { position: absolute; inset: 0; pointer-events: none; }
.cfc-caption { position: absolute; background: rgba(0,0,0,.6); color: #fff; padding: 0 6px; border-radius: 2px; white-space: nowrap; }
.cfc-message { position: absolute; color: #fff; background: rgba(160,60,0,.85); padding: 6px 8px; border-radius: 3px; white-space: pre-wrap; overflow: auto; overflow-wrap: anywhere; box-sizing: border-box; }
.cfc-wait { background: none; color: #aaa; }
.cfc-bad { color: #B04000; } .cfc-status, .cfc-help { font-size: 11px; } .cfc-help { color: var(--jp-ui-font-color2, #666); }
`

export default { render }
