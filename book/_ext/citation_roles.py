"""Sphinx extension: entries of the bibliography are list items, since ARIA has given up docutils' role for them."""


def rename(app, pagename, templatename, context, doctree):
    """Where docutils says doc-biblioentry, within a list, say listitem."""
    if "body" in context:
        context["body"] = context["body"].replace('role="doc-biblioentry"', 'role="listitem"')


def setup(app):
    app.connect("html-page-context", rename)
    return {"version": "1", "parallel_read_safe": True}
