"""Managing models: what a backend can be told to do with them, and the agent's own folder of GGUF files.

`manager` says what a backend offers and how it is asked; `folder` is the folder, `folder_manager` manages it,
`downloads` fills it. Only `outward` connects beyond this machine, and only because a call asked for it.
"""
