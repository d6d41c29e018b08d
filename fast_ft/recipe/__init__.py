"""A recipe, from YAML to checked values: schema, source lines, overrides, messages, lint, the homework's policy.

A YAML file and `key=value` words come in. A `Recipe` goes out, or one message that names each mistake with its line.
"""
