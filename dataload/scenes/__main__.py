"""python -m dataload.scenes: make the built-in generated corpus."""

from dataload.scenes import main

if __name__ == "__main__":
    main()
