"""What the site shows of the code: reference pages, drawings, notebooks, search terms."""
