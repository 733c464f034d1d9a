"""Window attention: reference.py is the definition, eager.py and sdpa.py are fast, op.py has the public
function."""
