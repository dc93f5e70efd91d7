"""The model of cost: time, bytes on the wire and memory of one video shared out by some degrees, from measured figures.

`split` puts together what `attention`, `wire` and `rest` say of one `Task`; `figures` reads `measured.json`, the only place
where there are figures. docs/parallel.md says how each is computed, and what is left out.
"""
