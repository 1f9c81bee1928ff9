"""Files: written whole or not at all (`temporaries`), read without trust (`reading`), tensors in them (`checkpoint`).

May be imported from anywhere; imports only `errors` and `pretrained`.
"""
