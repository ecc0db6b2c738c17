"""Proposal files of any form in, columns with an identity out."""
