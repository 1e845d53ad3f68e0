"""The built-in example: which body belongs to this function of the standard library?"""
