"""The stages of a run, one public function each; stages never import each other."""
