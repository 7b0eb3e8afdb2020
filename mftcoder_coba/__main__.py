from mftcoder_coba.cli import main

if __name__ == "__main__":
    main()
