"""Structured outputs: grammars compiled by llguidance, beside the step loop, and the tokens that they allow.

`grammar` translates what a request asks for, `sandbox` tries it in a process that may die of it, `compiler` compiles
and keeps what came through, `matcher` follows one sequence each.
"""
