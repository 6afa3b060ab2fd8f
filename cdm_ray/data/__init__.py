"""From images to batches: a source is packed into shards, and shards are streamed by lanes.

`sources` finds the images, `prepare` packs them, `manifest` describes the result, `shards` is the
file format, `order` says which lane shows which sample at which step, `stream` reads ahead.
"""
