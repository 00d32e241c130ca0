"use strict"
/* The page of a comparison: curves of all runs, and parallel coordinates. Texts are never read as HTML or TeX. */

const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#9467bd", "#8c564b", "#7f7f7f", "#bcbd22"]

function colour(run) {
  return COLOURS[run % COLOURS.length]
}

function themed(figure) {
  const style = getComputedStyle(document.documentElement)
  const [ink, page, line] = ["--ink", "--page", "--line"].map((name) => style.getPropertyValue(name).trim())
  Object.assign(figure, {background_fill_color: page, border_fill_color: page, outline_line_color: line})
  for (const axis of [...figure.xaxis, ...figure.yaxis]) {
    Object.assign(axis, {
      axis_label_text_color: ink, major_label_text_color: ink, axis_line_color: line, major_tick_line_color: line,
      minor_tick_line_color: line,
    })
  }
  for (const grid of [...figure.xgrid, ...figure.ygrid]) grid.grid_line_color = line
}

function newFigure(options) {
  const figure = Bokeh.Plotting.figure({
    height: 280, sizing_mode: "stretch_width", tools: "box_zoom,pan,wheel_zoom,reset,save", toolbar_location: "above",
    ...options,
  })
  figure.toolbar.logo = null
  return figure
}

function curves(data, lines) {
  return data.curves.map((curve) => {
    const figure = newFigure({y_axis_type: curve.log ? "log" : "linear"})
    figure.yaxis.axis_label = new Bokeh.PlainText({text: curve.title})
    figure.xaxis.axis_label = new Bokeh.PlainText({text: data.axis})
    if (data.reversed) figure.x_range.flipped = true
    curve.values.forEach((values, run) => {
      const y = values.map((value) => (value === null || (curve.log && value <= 0) ? NaN : value))
      const source = new Bokeh.ColumnDataSource({data: {x: data.positions, y, step: data.steps[run].map((step) => step ?? NaN)}})
      const line = figure.line({field: "x"}, {field: "y"}, {source, line_color: colour(run), line_width: 1.5})
      lines[run].push(line)
      figure.add_tools(new Bokeh.HoverTool({
        renderers: [line], mode: "mouse",
        tooltips: [["run", String(run + 1)], ["step", "@step{0}"], [data.axis, "@x{0.[000000]}"], ["value", "@y{0.000000}"]],
      }))
    })
    themed(figure)
    return figure
  })
}

function scaled(axis) {
  const of = axis.values.map((value) => (axis.log ? Math.log(value) : value))
  const [low, high] = [Math.min(...of), Math.max(...of)]
  return of.map((value) => (value - low) / (high - low))
}

function parallel(data, lines) {
  const axes = data.parallel
  const figure = newFigure({x_range: new Bokeh.Range1d({start: -0.3, end: axes.length - 0.7}), y_range: new Bokeh.Range1d({start: -0.15, end: 1.15})})
  const heights = axes.map(scaled)
  lines.forEach((renderers, run) => {
    const source = new Bokeh.ColumnDataSource({data: {x: axes.map((_, index) => index), y: heights.map((values) => values[run])}})
    renderers.push(figure.line({field: "x"}, {field: "y"}, {source, line_color: colour(run), line_width: 2}))
    renderers.push(figure.scatter({field: "x"}, {field: "y"}, {source, fill_color: colour(run), line_color: null, size: 7}))
  })
  const ink = getComputedStyle(document.documentElement).getPropertyValue("--ink").trim()
  axes.forEach((axis, index) => {
    figure.add_layout(new Bokeh.Span({location: index, dimension: "height", line_color: "#8888", line_width: 1}))
    const ends = [Math.min(...axis.values), Math.max(...axis.values)]
    ends.forEach((value, end) => figure.add_layout(new Bokeh.Label({
      x: index, y: end ? 1.03 : -0.12, text: Number(value.toPrecision(4)).toString(), text_align: "center", text_color: ink, text_font_size: "11px",
    })))
  })
  figure.xaxis.ticker = new Bokeh.FixedTicker({ticks: axes.map((_, index) => index)})
  figure.xaxis.major_label_overrides = new Map(axes.map((axis, index) => [index, new Bokeh.PlainText({text: axis.name})]))
  figure.yaxis.visible = false
  figure.ygrid.visible = false
  themed(figure)
  return figure
}

async function start() {
  Bokeh.set_log_level("warn")
  const data = JSON.parse(document.getElementById("data").textContent)
  const boxes = [...document.querySelectorAll("#overview input")]
  const lines = boxes.map(() => [])
  const charts = document.getElementById("charts")
  for (const figure of curves(data, lines)) {
    const place = charts.appendChild(document.createElement("div"))
    place.className = "plot"
    await Bokeh.Plotting.show(figure, place)
  }
  if (data.parallel.length) {
    document.getElementById("parallel").hidden = false
    await Bokeh.Plotting.show(parallel(data, lines), document.getElementById("parallel-chart"))
  }
  boxes.forEach((box, run) => {
    const key = box.parentElement.querySelector("i")
    Object.assign(key.style, {display: "inline-block", width: "0.8rem", height: "0.8rem", background: colour(run)})
    box.addEventListener("change", () => lines[run].forEach((line) => { line.visible = box.checked }))
  })
  document.documentElement.dataset.ready = "true"
}

start().catch((error) => {
  const failure = document.getElementById("failure")
  failure.hidden = false
  failure.textContent = `The figures could not be drawn: ${error}`
  throw error
})
