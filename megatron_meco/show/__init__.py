"""`meco show`: one local HTML page about a corpus, a plan, a run and its models.

`command` gathers facts as one JSON-serialisable object (`corpus_facts`, `packs`, `curves`,
`behaviour`), `page` puts it into a page that draws it with plotly.js, without a server or a
network.
"""
