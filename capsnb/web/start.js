// A classic script that every browser can read: it starts the widgets, or says beside the still picture why it cannot,
// and lets the keyboard scroll tables that are wider than the page.
(function () {
  var page = new URL("page.js", document.currentScript.src).href;

  function whenRead(action) {
    if (document.readyState !== "loading") action();
    else document.addEventListener("readystatechange", action, { once: true });
  }

  function say(sentence) {
    whenRead(function () {
      document.querySelectorAll(".capsnb-note").forEach(function (note) {
        note.textContent = sentence + " So this is a still picture.";
      });
    });
  }

  function start() {
    var script = document.createElement("script");
    script.type = "module";
    script.src = page;
    script.onerror = function () {
      say("A part of this website could not be loaded; loading the page again may help.");
    };
    document.head.append(script);
  }

  function focusWideTables() {
    document.querySelectorAll(".pst-scrollable-table-container").forEach(function (box) {
      if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
      else box.removeAttribute("tabindex");
    });
  }

  whenRead(focusWideTables);
  window.addEventListener("load", focusWideTables);
  window.addEventListener("resize", focusWideTables);

  if (location.protocol === "file:") {
    say("A browser does not let a page that was opened as a file read the model beside it; `make serve` shows it alive.");
  } else if (!("noModule" in HTMLScriptElement.prototype)) {
    say("This browser is too old to run the model; any browser of the last years can.");
  } else {
    whenRead(function () {
      if (document.querySelector(".capsnb[data-widget]")) start();
    });
  }
})();
