"""Files: written whole or not at all (`temporaries`), read without trust (`reading`), tensors in them (`checkpoint`).

Any room may import it; imports only `errors` and `pretrained`.
"""
