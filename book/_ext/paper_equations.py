"""Sphinx extension: an equation labelled ``eq-7`` is shown and cited as (7), the paper's number, on every page."""

from sphinx.domains.math import MathDomain


class PaperEquations(MathDomain):
    """Sphinx counts the equations of each page; here the label says the number."""

    def note_equation(self, docname, labelid, location=None):
        super().note_equation(docname, labelid, location)
        self.equations[labelid] = (docname, labelid.removeprefix("eq-"))


def setup(app):
    app.add_domain(PaperEquations, override=True)
    return {"version": "1", "parallel_read_safe": True}
