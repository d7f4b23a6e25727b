"""The service: ``bentoml serve`` turns prompts into pictures with the students in bundles/. No torch anywhere."""
