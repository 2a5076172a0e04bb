"""Curvature of a layer from samples: approximations, their averages, diagnostics."""
