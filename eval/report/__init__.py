"""From results to a page, Markdown and a picture."""
