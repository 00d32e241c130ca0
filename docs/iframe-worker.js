// A browser does not let a page from the disk start a worker. The worker of the search then runs in a hidden frame.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      this.frame.answer = data => this.dispatchEvent(new MessageEvent("message", {data}))
      this.frame.srcdoc =
        `<script>postMessage = data => frameElement.answer(data)</script><script src="${url}"></script>`
      this.loaded = new Promise(resolve => this.frame.addEventListener("load", resolve))
      document.body.append(this.frame)
    }

    async postMessage(data) {
      await this.loaded
      this.frame.contentWindow.dispatchEvent(new MessageEvent("message", {data}))
    }

    terminate() {
      this.frame.remove()
    }
  }
}
